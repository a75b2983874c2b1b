"""Correctness over HTTP: batches against single requests, and log-probabilities against transformers and PEFT."""

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server import Server

HERE = Path(__file__).resolve().parent
TOLERANCE = 0.06  # largest difference of log-probabilities in bf16
COMPARED = 0.5  # least share of the tokens that must be compared
REQUESTS, TOKENS = 64, 32
EVICTED = "adapters evicted and loaded again"


def words(seed: int, count: int) -> str:
    """Returns a prompt that no other seed gives."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(count))


def prompts(adapters: list[str]) -> list[tuple[str, str]]:
    """Returns requests for the adapters in turn, with texts of different lengths."""
    return [(adapters[i % len(adapters)], words(i, 4 + 9 * (i % 7))) for i in range(REQUESTS)]


def answers(server: Server, asks: list[tuple[str, str]], at_once: int) -> list[list[dict]]:
    """Returns the tokens of every request; `at_once` requests run at the same time."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda ask: server.generate(ask[1], ask[0], TOKENS)["tokens"], asks))


def compare(name: str, expected: list[list[dict]], got: list[list[dict]]) -> dict:
    """Compares answers with the expected ones, up to the first token that differs in each.

    There, the token that came must have been within the tolerance of the expected one (a near tie); up to there,
    log-probabilities must be within it, too. Later tokens have another context and are not compared, but a share of
    `COMPARED` must have been.
    """
    result = dict(check=name, requests=len(expected), identical=0, near_ties=0, wrong=0, max_logprob_difference=0.0)
    compared = 0
    for want, have in zip(expected, got, strict=True):
        for a, b in zip(want, have, strict=True):
            compared += 1
            if a["id"] != b["id"]:
                near = [top["id"] for top in a["alternative_tokens"] if a["logprob"] - top["logprob"] <= TOLERANCE]
                result["near_ties" if b["id"] in near else "wrong"] += 1
                break
            difference = abs(a["logprob"] - b["logprob"])
            result["max_logprob_difference"] = max(result["max_logprob_difference"], difference)
        else:
            result["identical"] += 1
    share = compared / max(1, sum(map(len, expected)))
    passed = result["wrong"] == 0 and result["max_logprob_difference"] <= TOLERANCE and share >= COMPARED
    return dict(result, compared=round(share, 3), passed=passed)


def batches(start, adapters: list[str], variants: dict[str, list[str]], expected: list) -> list[dict]:
    """Runs every request alone on the plain server, then all at once on servers with other flags. `start` makes a server.

    `expected` is filled with the answers alone, or used if it has them already. The variant `EVICTED` must have read
    adapters again.
    """
    asks, results = prompts(adapters), []
    for name, flags in variants.items():
        with start(flags) as server:
            if not expected:
                expected.extend(answers(server, asks, 1))
            results.append(compare(f"mixed batch equals alone: {name}", expected, answers(server, asks, 32)))
            results.append(compare(f"the same again: {name}", expected, answers(server, asks[::-1], 64)[::-1]))
        if name == EVICTED:  # the server has ended, so its log is complete
            read = server.adapters_read
            results.append(dict(check=name, adapters=len(adapters), read=read, passed=read > len(adapters)))
    return results


def reference(start, name: str, folders: tuple[Path, Path], names: list[str | None], texts: list[str]) -> dict:
    """Compares log-probabilities of prompts and answers with those of transformers and PEFT on the same device.

    `folders` are the model's and the adapters'. The check passes if they are within the tolerance of either computation
    there: in bf16, or in f32 from the same weights.
    """
    asks = [(adapter, text) for adapter in names for text in texts]
    with start([]) as server, ThreadPoolExecutor(8) as pool:
        details = list(pool.map(lambda ask: server.generate(ask[1], ask[0], TOKENS, prompt_scores=True), asks))
    cases = [
        dict(
            adapter=adapter,
            prompt=[token["id"] for token in detail["prefill"]],
            prompt_logprobs=[token["logprob"] for token in detail["prefill"][1:]],
            tokens=[token["id"] for token in detail["tokens"]],
            logprobs=[token["logprob"] for token in detail["tokens"]],
        )
        for (adapter, _), detail in zip(asks, details)
    ]
    command = [sys.executable, HERE / "reference.py", *folders]
    done = subprocess.run(list(map(str, command)), input=json.dumps(cases), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    passed = any(
        result[f"to_{short}"]["max"] <= TOLERANCE and result["tokens"][dtype]["wrong"] == 0
        for short, dtype in [("bf16", "bfloat16"), ("f32", "float32")]
    )
    return dict(check=f"transformers and PEFT: {name}", cases=len(cases), **result, passed=passed)

#!/usr/bin/env python3
"""The task `facts` of lm-eval: its scores from a server, beside those of transformers.

    evaluate.py golden MODEL_FOLDER OUT     scores of transformers in f32 (needs torch)
    evaluate.py server URL GGUF GOLDEN      scores of a server through `local-completions`, compared with a golden
"""

import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "fixtures"))
# Everything is read from local files.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("HF_HOME", tempfile.mkdtemp())

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

# Both compute in f32; sums of a few log-probabilities differ in the order of additions only.
TOLERANCE = 1e-3


def evaluate(backend: str, **model_args) -> dict:
    """Returns accuracies, and for each item the log-probability of every ending and whether it is the greedy one."""
    os.chdir(HERE)  # where the task finds its items
    tasks = TaskManager(include_path=str(HERE), include_defaults=False)
    result = lm_eval.simple_evaluate(
        model=backend, model_args=model_args, tasks=["facts"], task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    scores = result["results"]["facts"]
    items = sorted(result["samples"]["facts"], key=lambda item: item["doc_id"])
    return {
        "acc": scores["acc,none"],
        "acc_norm": scores["acc_norm,none"],
        "endings": [[[float(logprob), greedy in (True, "True")] for logprob, greedy in item["filtered_resps"]] for item in items],
    }


def golden(folder: str, out: str) -> None:
    """Writes transformers' scores."""
    out = Path(out).resolve()
    scores = evaluate("hf", pretrained=str(Path(folder).resolve()), dtype="float32", device="cpu", batch_size=1)
    for item in scores["endings"]:
        item[:] = [[float(f"{logprob:.7g}"), greedy] for logprob, greedy in item]
    out.write_text(json.dumps({"lm_eval": lm_eval.__version__, **scores}) + "\n")


def server(url: str, gguf: str, path: str) -> None:
    """Asserts that the server's scores are those of transformers."""
    from gguf_to_hf import convert_tokenizer

    expected = json.loads(Path(path).read_text())
    with tempfile.TemporaryDirectory() as folder:
        convert_tokenizer(Path(gguf), Path(folder))
        for batch in (1, 8):
            scores = evaluate(
                "local-completions", model=gguf, base_url=f"{url}/v1/completions", tokenizer=folder,
                tokenizer_backend="huggingface", num_concurrent=2, batch_size=batch, max_retries=1,
            )
            assert len(scores["endings"]) == len(expected["endings"]) == 50
            worst = 0.0
            for number, (ours, theirs) in enumerate(zip(scores["endings"], expected["endings"], strict=True)):
                for (logprob, greedy), (right, rightly) in zip(ours, theirs, strict=True):
                    worst = max(worst, abs(logprob - right))
                    assert greedy == rightly, f"item {number}: greedy {greedy}, not {rightly}"
            assert worst < TOLERANCE, f"a log-probability differs by {worst}"
            for name in ("acc", "acc_norm"):
                assert scores[name] == expected[name], f"{name} is {scores[name]}, not {expected[name]}"
            print(f"batches of {batch}: acc {scores['acc']}, acc_norm {scores['acc_norm']}, largest difference {worst:.1e}")


if __name__ == "__main__":
    {"golden": golden, "server": server}[sys.argv[1]](*sys.argv[2:])

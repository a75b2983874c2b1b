"""The exchange under load: adapters that were never read, a thousand of them, and sources that do not work."""

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from loads import Generator
from server import Refused, Server

ALONE = 8  # cold adapters that are asked for one after the other
AT_ONCE = 16
CLIENTS = 64
RATE = 60.0  # cold adapters a second while the gaps of running streams are measured
SETTLE_SECONDS = 20  # after ready, while host memory is set aside for adapters
HEALTHY = 30


class Cold:
    """Loads of adapters that no server has read. Every phase has a server of its own, which has read none yet."""

    def __init__(self, start: Callable[[], Server], generator: Callable[[Server], Generator], settle: float = SETTLE_SECONDS):
        self.start, self.generator, self.settle = start, generator, settle

    @contextmanager
    def fresh(self):
        """Starts a server and waits until its host memory has been set aside."""
        with self.start() as server:
            time.sleep(self.settle)
            generator = self.generator(server)
            yield generator

    def first_tokens(self) -> list[dict]:
        """First tokens of cold adapters alone and sixteen at once, and the gaps of running streams while others load."""
        with self.fresh() as g:
            g.bench("cold: base", "--prompt-tokens", 16, "--output-tokens", 4, "--requests", 8)
            names = iter(g.adapters[8:])
            take = lambda count: [next(names) for _ in range(count)]
            line = lambda time, name: dict(time=time, adapter=name, **{"in": 16}, out=1)
            alone = g.trace([line(1.0 * i, name) for i, name in enumerate(take(ALONE))], "cold: alone")
            at_once = g.trace([line(0.0, name) for name in take(AT_ONCE)], "cold: at once")
            g.touch(8)
            quiet = g.arrivals("cold: nobody", [])
            newcomers = list(names)[: int(RATE * g.steady / 160 / 2)]
            loud = g.arrivals("cold: at a rate", newcomers, rate=RATE)
            known = g.arrivals("cold: the same again", newcomers, rate=RATE)  # what their prompts take
        waited = lambda requests: statistics.median(r["events_ms"][0] - r["planned_ms"] for r in requests)
        return [
            dict(cold="alone", adapters=ALONE, ttft_p50=waited(alone), ttft_max=max(r["events_ms"][0] - r["planned_ms"] for r in alone)),
            dict(cold="at once", adapters=AT_ONCE, ttft_p50=waited(at_once)),
            quiet,
            *(dict(r, gap_p99_ratio=r["gap_p99"] / quiet["gap_p99"]) for r in (loud, known)),
        ]

    def sweep(self, prompt: int) -> dict:
        """All adapters once, by 64 clients."""
        with self.fresh() as g:
            count = len(g.adapters)
            short = ["--prompt-tokens", prompt, "--output-tokens", 1, "--streams", CLIENTS, "--requests", count]
            report = g.report(f"cold sweep {prompt}", *g.named(count), "--popularity", "round-robin", *short)
        return dict(
            cold="all, 64 clients",
            adapters=count,
            prompt=prompt,
            adapters_per_second=count / report["seconds"],
            ttft=report["ttft_ms"] and report["ttft_ms"]["p50"],
            errors=report["errors"],
        )


def thousand(g: Generator, rounds: int) -> list[dict]:
    """64 streams over all adapters by Zipf's law with exponent 1, beside the same streams over 32 adapters."""
    prompt = ["--prompt-tokens", g.size(512), "--output-tokens", g.size(128), "--streams", 64, "--requests", 64 * rounds]
    results = []
    g.touch(len(g.adapters))
    for name, count, popularity in [("32 adapters", 32, "round-robin"), ("all adapters", len(g.adapters), "zipf:1.0")] * 2:
        label = f"thousand: {name} {len(results)}"
        report = g.report(label, *g.named(count), "--popularity", popularity, *prompt)
        results.append(
            dict(thousand=name, adapters=count, tokens=report["output_tokens_per_second"], ttft=report["ttft_ms"]["p50"], errors=report["errors"])
        )
    few, many = (max(r["tokens"] for r in results[i::2]) for i in (0, 1))
    return [*results, dict(thousand="ratio", ratio=many / few)]


def round_robin(g: Generator, server: Server, turns: int) -> list[dict]:
    """All adapters in turn, of which host memory holds some and slots fewer: a pass over all of them by 16 clients, and the
    gaps of running streams alone and while a part of them arrives, by turns."""
    ask = ["--prompt-tokens", 16, "--output-tokens", 4, "--streams", 16, "--requests", 2 * len(g.adapters)]
    report = g.report("round robin: all", *g.named(len(g.adapters)), "--popularity", "round-robin", *ask)
    passed = dict(round_robin="two passes", adapters=len(g.adapters), seconds=report["seconds"], errors=report["errors"])
    results, ratios = [dict(passed, capacity=server.get("/v1/adapters/capacity"), memory=server.memory())], []
    g.touch(8)
    newcomers = g.adapters[8:]
    for turn in range(turns):
        part = newcomers[turn * len(newcomers) // turns : (turn + 1) * len(newcomers) // turns]
        kinds = [("quiet", []), ("loud", part)]
        gaps = {}
        for kind, arriving in kinds if turn % 2 == 0 else reversed(kinds):
            results.append(g.arrivals(f"round robin: {kind} {turn}", arriving, rate=RATE))
            gaps[kind] = results[-1]["gap_p99"]
        ratios.append(gaps["loud"] / gaps["quiet"])
    return [*results, dict(round_robin="ratio", ratios=ratios, ratio=statistics.median(ratios), memory=server.memory())]


class BadHub(BaseHTTPRequestHandler):
    """A hub each of whose repositories fails in another way."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        kind = next((kind for kind in ["hangs", "denied", "huge", "drips", "corrupt"] if f"/{kind}" in self.path), None)
        if kind == "hangs":
            self.server.ended.wait()
        elif kind == "denied" or kind is None:
            self.answer(403 if kind else 404, b"{}")
        elif self.path.startswith("/api/"):
            size = 20 << 30 if kind == "huge" else 1 << 20
            files = [("adapter_config.json", 2), ("adapter_model.safetensors", size)]
            siblings = ",".join(f'{{"rfilename":"{name}","size":{bytes},"blobId":"{kind}"}}' for name, bytes in files)
            self.answer(200, f'{{"id":"bad/{kind}","sha":"{kind:0<40}","siblings":[{siblings}]}}'.encode())
        else:
            self.answer(200, b"{}" if self.path.endswith(".json") else b"\x01" * (1 << 20), drips=kind == "drips")

    def answer(self, status: int, body: bytes, drips: bool = False) -> None:
        self.send_response(status)
        for name, value in [("Content-Length", len(body)), ("ETag", f'"{len(body):040x}"'), ("X-Repo-Commit", self.path.split("/")[-2])]:
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for i in range(0, len(body), 1 if drips else len(body)):
                self.wfile.write(body[i : i + (1 if drips else len(body))])
                if drips and self.server.ended.wait(1.0):
                    return
        except OSError:
            pass  # the client has gone


@contextmanager
def bad_hub():
    """Runs a hub that does not work; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BadHub)
    server.ended = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.ended.set()
        server.shutdown()


BAD = ["hangs", "denied", "huge", "drips", "corrupt"]


def ask_for_bad_ones(server: Server, ended: threading.Event, answers: list[int]) -> None:
    """Asks for adapters that cannot be had, each kind by two clients, until told to end."""

    def client(kind: str) -> None:
        turn = 0
        while not ended.is_set():
            turn += 1
            body = dict(inputs="a", parameters=dict(adapter_id=f"bad/{kind}-{turn % 7}", adapter_source="hub", max_new_tokens=1))
            try:
                server.post("/generate", body)
                answers.append(200)
            except Refused as refused:
                answers.append(refused.status)
            except OSError:
                return  # the server ends
            ended.wait(0.05)

    for kind in BAD * 2:
        threading.Thread(target=client, args=(kind,), daemon=True).start()


def sources(g: Generator, server: Server, rounds: int, pairs: int) -> list[dict]:
    """Healthy adapters under load, alone and beside adapters of five kinds that cannot be had, in turns."""
    load = ["--streams", HEALTHY, "--prompt-tokens", g.size(512), "--output-tokens", g.size(128), "--requests", HEALTHY * rounds]
    g.touch(HEALTHY)
    results, tokens = [], dict(quiet=[], bad=[])
    for turn in range(pairs):
        for kind in tokens if turn % 2 == 0 else reversed(tokens):
            ended, answers = threading.Event(), []
            if kind == "bad":
                ask_for_bad_ones(server, ended, answers)
                time.sleep(0.5)
            report = g.report(f"sources: {kind} {turn}", *g.named(HEALTHY), "--popularity", "round-robin", *load)
            ended.set()
            tokens[kind].append(report["output_tokens_per_second"])
            statuses = {status: answers.count(status) for status in sorted(set(answers))}
            results.append(dict(sources=kind, tokens=tokens[kind][-1], errors=report["errors"], statuses=statuses))
    ratio = statistics.median(bad / quiet for bad, quiet in zip(tokens["bad"], tokens["quiet"], strict=True))
    return [*results, dict(sources="ratio", ratio=ratio)]

"""The loads to measure, what vLLM reached under them on the same card and shape, and what we aim at."""

import json
import statistics
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

from server import Server

PROMPT, OUTPUT = 512, 128
SILENT_SECONDS = 120  # that a stream may be; reading 256 adapters takes 24
RUN_SECONDS = 900  # of one load; half a minute is usual


@dataclass(frozen=True)
class Load:
    """A closed loop. `peer` is vLLM 0.24's (tokens/s, TTFT p50, TPOT p50), milliseconds."""

    name: str
    streams: int
    adapters: int = 0
    popularity: str = "distinct"
    output: int = OUTPUT
    peer: tuple[float | None, float | None, float | None] = (None, None, None)
    goal: tuple[str, str, float] | None = None  # figure, relation, value


LOADS = {
    load.name: load
    for load in [
        Load("base-1", 1, peer=(152, 25, 6.46), goal=("tpot", "<=", 6.2)),
        Load("base-8", 8, peer=(1056, 110, 6.72)),
        Load("base-32", 32, peer=(2972, 337, 8.14)),
        Load("base-64", 64, peer=(4321, 509, 10.3)),
        Load("base-128", 128, peer=(5400, 1051, 15.3)),
        Load("base-256", 256, peer=(5449, 1890, 32.7)),
        Load("lora-1x1", 1, 1, peer=(124, 31, 7.91), goal=("tpot", "<=", 6.6)),
        Load("lora-8x8", 8, 8, peer=(688, 171, 11.2)),
        Load("lora-32x32", 32, 32, peer=(1238, 620, 21.3), goal=("tokens", ">=", 2500)),
        Load("lora-64x32", 64, 32, peer=(1953, 892, 26.2)),
        Load("lora-128x32", 128, 32, peer=(2891, 968, 36.4), goal=("tokens", ">=", 4800)),
        Load("lora-256x32", 256, 32, peer=(3641, 1001, 61.5)),
        Load("lora-32x1", 32, 1, "identical", peer=(2443, 507, 10.4)),
        Load("lora-128x1", 128, 1, "identical", peer=(3817, 940, 25.8)),
        Load("many-zipf", 64, 256, "zipf:1.1", peer=(1610, 903, 30.1)),
        Load("many-round-robin", 64, 256, "round-robin", peer=(1042, 4341, 27.4), goal=("tokens", ">=", 3000)),
        Load("first-token", 1, 1, output=1, peer=(None, 31, None), goal=("ttft", "<=", 22)),
    ]
}
GROUPS = {
    "base": [name for name in LOADS if name.startswith("base-")],
    "lora": [name for name in LOADS if name.startswith("lora-")] + ["first-token"],
    "many": [name for name in LOADS if name.startswith("many-")],
}


class Generator:
    """Runs lorax-bench against a server."""

    def __init__(self, binaries: Path, server: Server, vocab: int, out: Path, lengths: tuple[float, int]):
        self.command = [binaries / "lorax-bench", "--url", server.url, "--vocab", vocab]
        self.out, (self.scale, self.steady) = out, lengths
        self.adapters = sorted((p.name for p in server.adapters.iterdir()), key=lambda name: int(name[1:]))

    def bench(self, label: str, *arguments) -> None:
        """One run, none of whose requests may fail."""
        done = self.run(label, *arguments)
        if done.returncode:
            raise RuntimeError(done.stderr)

    def report(self, label: str, *arguments) -> dict:
        """One run's report, which is also kept; failed requests are in it."""
        path = self.out / "report.json"
        path.unlink(missing_ok=True)
        done = self.run(label, *arguments, "--json", path)
        if not path.exists():
            raise RuntimeError(done.stderr)
        line = path.read_text()
        path.unlink()
        with open(self.out / "loads.jsonl", "a") as f:
            f.write(line)
        return json.loads(line)

    def run(self, label: str, *arguments) -> subprocess.CompletedProcess:
        """One run, with prompts that no other label has: the server may have a prefix cache."""
        named = ["--label", label, "--seed", zlib.crc32(label.encode()), "--timeout", SILENT_SECONDS]
        command = [*self.command, *named, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=RUN_SECONDS)

    def named(self, adapters: int) -> list:
        """Arguments for the first adapters."""
        return ["--adapters", ",".join(self.adapters[:adapters])] if adapters else []

    def size(self, tokens: int) -> int:
        """A length, scaled for small machines."""
        return max(1, round(tokens * self.scale))

    def touch(self, adapters: int) -> None:
        """Has the first adapters read into host memory."""
        short = ["--prompt-tokens", 8, "--output-tokens", 1, "--streams", 16, "--requests", adapters]
        self.bench(f"touch {adapters}", *self.named(adapters), "--popularity", "round-robin", *short)

    def measure(self, load: Load, rounds: int, slots: str) -> dict:
        """Warms up and measures."""
        streams = ["--streams", load.streams, *self.named(load.adapters), "--popularity", load.popularity]
        prompt = ["--prompt-tokens", self.size(PROMPT)]
        few = ["--requests", load.streams, "--output-tokens", min(load.output, 12)]
        self.bench(f"{load.name} warm-up", *streams, *prompt, *few)
        requests = max(rounds * load.streams, 4 * rounds if load.streams > 1 or load.output > 1 else 10 * rounds)
        label = load.name if slots == "default" else f"{load.name}/{slots}"
        output = min(load.output, self.size(OUTPUT))
        report = self.report(label, *streams, *prompt, "--requests", requests, "--output-tokens", output)
        middle = lambda figure: report[figure] and report[figure]["p50"]
        return dict(
            load=label,
            adapters=min(load.adapters, len(self.adapters)),
            tokens=report["output_tokens_per_second"],
            ttft=middle("ttft_ms"),
            tpot=middle("tpot_ms"),
            gap_p99=report["gap_ms"] and report["gap_ms"]["p99"],
            jain=report["jain_index"],
            errors=report["errors"],
            seconds=report["seconds"],
        )

    def trace(self, lines: list[dict], label: str) -> list[dict]:
        """Replays a trace; the raw times of every request."""
        path, times = self.out / "trace.jsonl", self.out / "times.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.bench(label, "--trace", path, "--times", times)
        found = [json.loads(line) for line in times.read_text().splitlines()]
        path.unlink()
        times.unlink()
        return found

    def arrivals(self, kind: str, newcomers: list[str], streams: int = 16) -> dict:
        """Gaps of streams of the base model and of warm adapters, from the arrival of others to their first tokens."""
        tokens, arrive = self.steady, 0.5
        steady = [dict(time=0.0, adapter=self.adapters[i % 8], **{"in": 16}, out=tokens) for i in range(streams)]
        new = [dict(time=arrive, adapter=name, **{"in": 16}, out=4) for name in newcomers]
        requests = self.trace(steady + new, kind)
        begun = [r for r in requests if r["adapter"] in newcomers]
        end = max((r["events_ms"][0] for r in begun), default=float("inf"))
        first = max(r["events_ms"][0] for r in requests if r["adapter"] not in newcomers)
        window = (max(first, arrive * 1e3 if begun else 0.0), end)
        gaps = [
            b - a
            for r in requests
            if r["adapter"] not in newcomers
            for a, b in zip(r["events_ms"], r["events_ms"][1:])
            if window[0] <= b <= window[1]
        ]
        if not gaps:
            raise RuntimeError("no token of the streams came while others arrived: let them be longer with --steady")
        gaps.sort()
        at = lambda q: gaps[min(len(gaps) - 1, int(q * len(gaps)))]
        waited = [r["events_ms"][0] - r["planned_ms"] for r in begun]
        return dict(
            arrivals=kind,
            newcomers=len(newcomers),
            gaps=len(gaps),
            gap_p50=at(0.5),
            gap_p99=at(0.99),
            gap_max=gaps[-1],
            newcomers_ttft=statistics.median(waited) if waited else None,
            window_ms=None if end == float("inf") else end - window[0],
        )

    def cold(self, count: int = 16) -> list[dict]:
        """Nobody arrives, known adapters do, adapters that nothing was read of do."""
        if len(self.adapters) < 8 + 2 * count:
            raise RuntimeError(f"{len(self.adapters)} adapters: too few to have some that were never read")
        warm, unknown = self.adapters[8 : 8 + count], self.adapters[-count:]
        self.touch(8 + count)
        return [self.arrivals("nobody", []), self.arrivals("warm adapters", warm), self.arrivals("cold adapters", unknown)]


def verdict(result: dict, slots: str) -> str:
    """Whether a load reached its goal."""
    load = LOADS[result["load"].split("/")[0]]
    if load.goal is None or (slots != "default" and load.name != "many-round-robin"):
        return ""
    figure, relation, value = load.goal
    got = result[figure]
    met = got is not None and (got <= value if relation == "<=" else got >= value)
    return f"{figure} {relation} {value}: {'met' if met else 'MISSED'}"


def table(results: list[dict], comparable: bool) -> list[str]:
    """Our figures; beside the peer's and the goals where model and card are those that the peer had."""
    show = lambda x, digits=1: "-" if x is None else f"{x:.{digits}f}"
    lines = [f"{'load':32}{'tok/s':>8}{'vLLM':>7}{'TTFT':>8}{'vLLM':>7}{'TPOT':>8}{'vLLM':>7}  err  goal"]
    for r in results:
        name, _, slots = r["load"].partition("/")
        same = comparable and r["adapters"] == LOADS[name].adapters
        tokens, ttft, tpot = LOADS[name].peer if same else (None, None, None)
        lines.append(
            f"{r['load']:32}{show(r['tokens'], 0):>8}{show(tokens, 0):>7}{show(r['ttft']):>8}{show(ttft, 0):>7}"
            f"{show(r['tpot'], 2):>8}{show(tpot, 2):>7}{r['errors']:5}  {verdict(r, slots or 'default') if same else ''}"
        )
    return lines

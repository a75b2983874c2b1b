"""The loads to measure, the figures that we aim at, and the load generator that makes them."""

import json
import statistics
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

from server import Server

PROMPT, OUTPUT = 512, 128
SILENT_SECONDS = 120  # a stream without a token for longer has failed; reading 256 adapters takes 24 s
RUN_SECONDS = 900  # a load that takes longer has failed; half a minute is usual


# A list of records that is longer than any answer here.
SCHEMA = dict(
    type="array",
    minItems=1000,
    items=dict(
        type="object",
        properties=dict(name=dict(type="string"), age=dict(type="integer"), tags=dict(type="array", items=dict(type="string"))),
        required=["name", "age", "tags"],
        additionalProperties=False,
    ),
)


@dataclass(frozen=True)
class Load:
    """A closed loop: each stream sends its next request when the one before has been answered."""

    name: str
    streams: int
    adapters: int = 0
    popularity: str = "distinct"
    output: int = OUTPUT
    prompt: int = PROMPT
    goal: tuple[str, str, float] | None = None  # figure, relation, value
    constrained: bool = False  # whether answers keep to SCHEMA


LOADS = {
    load.name: load
    for load in [
        Load("base-1", 1, goal=("tpot", "<=", 6.2)),
        Load("base-8", 8),
        Load("base-32", 32),
        Load("base-64", 64),
        Load("base-128", 128),
        Load("base-256", 256),
        Load("lora-1x1", 1, 1, goal=("tpot", "<=", 6.6)),
        Load("lora-8x8", 8, 8),
        Load("lora-32x32", 32, 32, goal=("tokens", ">=", 2500)),
        Load("lora-64x32", 64, 32),
        Load("lora-128x32", 128, 32, goal=("tokens", ">=", 4800)),
        Load("lora-256x32", 256, 32),
        Load("lora-32x1", 32, 1, "identical"),
        Load("lora-128x1", 128, 1, "identical"),
        Load("many-zipf", 64, 256, "zipf:1.1"),
        Load("many-round-robin", 64, 256, "round-robin", goal=("tokens", ">=", 3000)),
        Load("json-1", 1, constrained=True),
        Load("json-32", 32, constrained=True),
        Load("json-256", 256, constrained=True),
        Load("first-token", 1, 1, output=1, goal=("ttft", "<=", 22)),
        Load("first-token-2048", 1, 1, output=1, prompt=2048),
    ]
}
GROUPS = {
    "base": [name for name in LOADS if name.startswith("base-")],
    "lora": [name for name in LOADS if name.startswith("lora-")] + ["first-token", "first-token-2048"],
    "many": [name for name in LOADS if name.startswith("many-")],
    "structured": ["base-1", "json-1", "base-32", "json-32", "base-256", "json-256"],
}


class Generator:
    """Runs lorax-bench against a server."""

    def __init__(self, binaries: Path, server: Server, vocab: int, out: Path, lengths: tuple[float, int]):
        self.command = [binaries / "lorax-bench", "--url", server.url, "--vocab", vocab]
        self.out, (self.scale, self.steady) = out, lengths
        self.adapters = sorted((p.name for p in server.adapters.iterdir()), key=lambda name: int(name[1:]))

    def bench(self, label: str, *arguments) -> None:
        """Runs the generator; a failed request is an error."""
        done = self.run(label, *arguments)
        if done.returncode:
            raise RuntimeError(done.stderr)

    def report(self, label: str, *arguments) -> dict:
        """Runs the generator and returns its report, which counts failed requests. The report is also kept in loads.jsonl."""
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
        """Runs the generator with prompts that depend on the label alone: labels on one server share no prefix."""
        named = ["--label", label, "--seed", zlib.crc32(label.encode()), "--timeout", SILENT_SECONDS]
        command = [*self.command, *named, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=RUN_SECONDS)

    def named(self, adapters: int) -> list:
        """The arguments that name the first adapters."""
        return ["--adapters", ",".join(self.adapters[:adapters])] if adapters else []

    def size(self, tokens: int) -> int:
        """A length in tokens, scaled by `--scale` for small machines."""
        return max(1, round(tokens * self.scale))

    def touch(self, adapters: int) -> None:
        """Sends short requests that make the shard read the first adapters into host memory."""
        short = ["--prompt-tokens", 8, "--output-tokens", 1, "--streams", 16, "--requests", adapters]
        self.bench(f"touch {adapters}", *self.named(adapters), "--popularity", "round-robin", *short)

    def measure(self, load: Load, rounds: int, slots: str) -> dict:
        """Runs the load briefly as a warm-up, then measures it."""
        streams = ["--streams", load.streams, *self.named(load.adapters), "--popularity", load.popularity]
        streams += ["--guided-json", json.dumps(SCHEMA)] if load.constrained else []
        prompt = ["--prompt-tokens", self.size(load.prompt)]
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
        """Replays a trace and returns the times of every request and its tokens."""
        path, times = self.out / "trace.jsonl", self.out / "times.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.bench(label, "--trace", path, "--times", times)
        found = [json.loads(line) for line in times.read_text().splitlines()]
        path.unlink()
        times.unlink()
        return found

    def arrivals(self, kind: str, newcomers: list[str], streams: int = 16, rate: float = float("inf")) -> dict:
        """Measures the gaps between tokens of running streams while newcomers arrive, at once or at a rate, until each has its first token."""
        tokens, arrive = self.steady, 0.5
        steady = [dict(time=0.0, adapter=self.adapters[i % 8], **{"in": 16}, out=tokens) for i in range(streams)]
        new = [dict(time=arrive + i / rate, adapter=name, **{"in": 16}, out=4) for i, name in enumerate(newcomers)]
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
        """Measures arrivals three times: of nobody, of adapters in host memory, of adapters that were never read."""
        if len(self.adapters) < 8 + 2 * count:
            raise RuntimeError(f"{len(self.adapters)} adapters: too few to have some that were never read")
        warm, unknown = self.adapters[8 : 8 + count], self.adapters[-count:]
        self.touch(8 + count)
        return [self.arrivals("nobody", []), self.arrivals("warm adapters", warm), self.arrivals("cold adapters", unknown)]


def verdict(result: dict) -> str | None:
    """Whether a load reached its goal, in words; none for a load without a goal."""
    name, _, slots = result["load"].partition("/")
    goal = LOADS[name].goal
    if goal is None or (slots and name != "many-round-robin"):
        return None
    figure, relation, value = goal
    got = result[figure]
    met = got is not None and (got <= value if relation == "<=" else got >= value)
    return f"{result['load']}: {figure} {relation} {value} {'met' if met else 'MISSED'}"

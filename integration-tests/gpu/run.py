#!/usr/bin/env python3
"""Measures and checks a whole server on one GPU, phase by phase: see README.md.

Every phase prints its results as it goes and appends them to OUT/results.jsonl; table.py turns those into the tables of
docs/benchmarks.md. The model and its adapters stay in the work folder for the next call.
"""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from check import EVICTED, batches, reference, words
from crash import Crash
from exchange import Cold, bad_hub, round_robin, sources, thousand
from loads import GROUPS, LOADS, Generator, verdict
from server import Server, card
from soak import Soak
from table import markdown, measured

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures"
CHECK_RANKS = [1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64, 80, 96, 127, 128]
QUESTIONS = [
    "Show the name of all ships.",
    "Review: The laptop was wonderful.",
    "Once upon a time",
    "def fibonacci(n):\n",
    "Ships sail across the sea. " * 12,
]
FLAGS = ["--max-batch-size", "256", "--prefix-caching", "false", "--adapter-host-memory", "26GiB"]  # of every server
LOG_BYTES = 4 << 20  # the end of the servers' log that is kept


def merged(*lists: list[str]) -> list[str]:
    """Joins lists of flags and their values; a later value replaces an earlier one."""
    values = {flag: value for flags in lists for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    return [word for pair in values.items() for word in pair]


class Session:
    """One call of this script: its settings, its results, and the servers that it starts."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.results, self.failed = args, [], []
        args.out.mkdir(parents=True, exist_ok=True)
        args.work.mkdir(parents=True, exist_ok=True)
        self.log = args.out / "server.log"

    def say(self, result: dict) -> dict:
        """Keeps and prints a result, with the commit if it is known."""
        if self.args.commit:
            result = dict(commit=self.args.commit) | result
        self.results.append(result)
        line = json.dumps(result)
        print(line, flush=True)
        with open(self.args.out / "results.jsonl", "a") as f:
            f.write(line + "\n")
        return result

    def server(
        self, flags: list[str], model: Path | None = None, adapters: Path | None = None, environment: dict[str, str] | None = None
    ) -> Server:
        """Starts a server, of the large model unless another is given."""
        model, adapters = model or self.args.work / "model", adapters or self.args.work / "adapters"
        flags = merged(["--device", self.args.device], FLAGS, self.args.flags, flags)
        server = Server(self.args.bin, model, adapters, self.log, flags, environment)
        ready = dict(ready_seconds=round(server.ready_seconds, 2), model=model.name, flags=" ".join(flags))
        try:
            self.say(dict(ready, memory=server.memory()))
        except BaseException:
            server.stop()  # no caller has it yet who could
            raise
        return server

    def generator(self, server: Server) -> Generator:
        """The load generator for a server."""
        return Generator(self.args.bin, server, self.args.vocab, self.args.out, (self.args.scale, self.args.steady))

    def make(self, folder: Path, shape: str, ranks: list[int], *more: str) -> dict:
        """Writes a model and adapters and returns what was written, in a process of its own so that nothing of it stays on the GPU."""
        command = [sys.executable, HERE / "model.py", folder, "--shape", shape]
        command += [*(["--ranks", ",".join(map(str, ranks))] if ranks else []), *more]
        made = json.loads(subprocess.check_output(list(map(str, command)), text=True))
        return self.say(dict(made=str(folder), shape=shape, adapters=len(ranks), **made))

    def guard(self, name: str, phase) -> None:
        """Runs a phase. If it fails, that is recorded as a result, and the other phases still run."""
        begun = time.monotonic()
        try:
            phase()
        except Exception as error:
            self.failed.append(name)
            self.say(dict(failed=name, error=f"{type(error).__name__}: {error}"[-3000:]))
        print(f"# {name}: {time.monotonic() - begun:.1f} s", flush=True)

    def cut_log(self) -> None:
        """Cuts the log to its end."""
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.write_bytes(self.log.read_bytes()[-LOG_BYTES:])


def make_model(s: Session) -> None:
    """Writes the large model with its adapters."""
    s.make(s.args.work, s.args.shape, [16] * s.args.adapters)


def measure(s: Session, names: list[str], slots: int | None) -> None:
    """Runs loads on one server, with the given number of slots or the default one."""
    many = any(LOADS[name].adapters > 32 for name in names if name in LOADS)
    with s.server(["--max-active-adapters", str(slots)] if slots else []) as server:
        generator = s.generator(server)
        if "cold" in names:
            s.guard("cold", lambda: [s.say(r) for r in generator.cold()])
        begun = time.monotonic()
        needed = max((LOADS[name].adapters for name in names if name != "cold"), default=0)
        if needed := min(needed, len(generator.adapters)):
            generator.touch(needed)
            s.say(dict(touched=needed, seconds=round(time.monotonic() - begun, 2)))
        for name in names:
            if name != "cold":
                label = f"{slots}-slots" if many and slots else "default"
                s.guard(name, lambda: s.say(generator.measure(LOADS[name], s.args.rounds, label)))
        s.say(dict(after="loads", memory=server.memory()))


def loading(s: Session) -> None:
    """Measures adapters that no server has read."""
    cold = Cold(lambda: s.server(["--adapter-host-memory", s.args.host]), s.generator, s.args.settle)
    s.guard("first tokens of cold adapters", lambda: [s.say(r) for r in cold.first_tokens()])
    for prompt in [32, 512]:
        s.guard(f"cold adapters, prompts of {prompt}", lambda: s.say(cold.sweep(prompt)))


def many_small(s: Session) -> None:
    """Measures a thousand adapters in host memory."""
    s.make(s.args.work, s.args.shape, [16] * s.args.thousand, "--into", "small", "--targets", "q_proj,k_proj,v_proj,o_proj")
    with s.server(["--adapter-host-memory", s.args.thousand_host], adapters=s.args.work / "small") as server:
        for result in thousand(s.generator(server), s.args.rounds):
            s.say(result)


def broken_sources(s: Session) -> None:
    """Measures healthy adapters beside sources that do not work."""
    with bad_hub() as address, s.server([], environment=dict(HF_ENDPOINT=address)) as server:
        for result in sources(s.generator(server), server, s.args.rounds, s.args.pairs):
            s.say(result)


def few_slots(s: Session) -> None:
    """Measures more adapters than host memory and slots hold."""
    with s.server(["--adapter-host-memory", s.args.few_host, "--max-active-adapters", "32"]) as server:
        for result in round_robin(s.generator(server), server, s.args.pairs):
            s.say(result)


def families(s: Session) -> None:
    """Measures models of other families' shapes: 1 and 32 streams, without and with adapters."""
    for name in s.args.families:
        folder = s.args.work / name
        made = s.make(folder, name, [16] * 32)
        with s.server([], folder / "model", folder / "adapters") as server:
            vocab = min(s.args.vocab, made["vocab"] - 2)
            generator = Generator(s.args.bin, server, vocab, s.args.out, (s.args.scale, s.args.steady))
            generator.touch(32)
            for load in ["base-1", "lora-1x1", "base-32", "lora-32x32"]:
                got = generator.measure(LOADS[load], s.args.rounds, "default")
                under = dict(family=name, under=got.pop("load"), step_bytes=made["step_bytes"])
                s.say(dict(under, check=f"{load} {name}", passed=got["errors"] == 0, **got))
        shutil.rmtree(folder)  # tens of gigabytes


def check_batches(s: Session) -> None:
    """Compares batches over adapters of many ranks with each request alone."""
    folder = s.args.work / "wide"
    s.make(folder, s.args.check_shape, CHECK_RANKS)
    names = [f"a{i}" for i in range(len(CHECK_RANKS))]
    variants = {"default": []}
    small = ["--adapter-host-memory", s.args.check_host, "--max-adapter-size", s.args.check_host]
    variants[EVICTED] = ["--max-active-adapters", "5", *small]
    variants["prompts in chunks of 7"] = ["--max-batch-prefill-tokens", "7"]
    variants["without graphs"] = ["--eager", "true"]
    variants |= {name: shlex.split(flags) for name, _, flags in (v.partition("=") for v in s.args.variant)}
    start = lambda flags: s.server(flags, folder / "model", folder / "adapters")
    for result in batches(start, names, variants, []):
        s.say(result)


def check_reference(s: Session) -> None:
    """Compares log-probabilities of the wide model with those of transformers and PEFT."""
    folder = s.args.work / "wide-16"
    s.make(folder, s.args.check_shape, [16] * 3)
    texts = [words(seed, count) for seed, count in [(1, 3), (2, 20), (3, 60), (4, 100)]]
    start = lambda flags: s.server(flags, folder / "model", folder / "adapters")
    folders = (folder / "model", folder / "adapters")
    s.say(reference(start, s.args.check_shape, folders, [None, "a0", "a1", "a2"], texts))


def check_demo(s: Session) -> None:
    """Compares the demo model, served from its GGUF file, with its conversion under transformers and PEFT."""
    folder, adapters = s.args.work / "demo", FIXTURES / "adapters"
    if not folder.exists():
        part = s.args.work / "demo.part"  # may be left from a conversion that was stopped midway
        shutil.rmtree(part, ignore_errors=True)
        subprocess.run(list(map(str, [sys.executable, FIXTURES / "gguf_to_hf.py", s.args.demo, part])), check=True)
        part.rename(folder)
    names = sorted(path.name for path in adapters.iterdir())
    start = lambda flags: s.server(flags, s.args.demo, adapters)
    s.say(reference(start, "demo model", (folder, adapters), [None, *names], QUESTIONS))
    for result in batches(start, names, {"default, demo model": []}, []):
        s.say(result)


def soak(s: Session) -> None:
    """Runs random load, with pools so small that they are soon full."""
    flags = ["--max-active-adapters", "12", "--adapter-host-memory", s.args.soak_host]
    with s.server(flags) as server:
        run = Soak(server, s.args.work / "adapters", s.args.seconds)
        try:
            s.say(run.run())
        finally:
            for visitor in (s.args.work / "adapters").glob("visitor-*"):
                shutil.rmtree(visitor)
            with open(s.args.out / "soak-memory.jsonl", "w") as f:
                f.writelines(json.dumps(sample) + "\n" for sample in run.samples)


def crash(s: Session) -> None:
    """Kills the ranks under load, one after the other, and stops them, if that is asked for more than once."""
    with s.server([]) as server:
        for turn in range(s.args.crashes):
            rank, how = turn % len(server.shards()), signal.SIGSTOP if turn % 4 >= 2 else signal.SIGKILL
            s.say(Crash(server).run(rank, how))


PHASES = ["model", *GROUPS, "slots", "cold", "loading", "thousand", "round-robin", "sources", "families", "check", "reference", "demo", "crash", "soak"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="+", help=f"of {' '.join(PHASES)}, or single loads: {' '.join(LOADS)}")
    parser.add_argument("--bin", type=Path, required=True, help="folder of the four programs")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="gets results.jsonl, loads.jsonl, server.log")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/lorax"), help="gets models and adapters")
    parser.add_argument("--commit", help="of the binaries; it is noted in every line of results.jsonl")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="8b", help="of the measured model")
    parser.add_argument("--families", nargs="+", default=["qwen3-8b", "gemma2-9b", "mistral-7b"])
    parser.add_argument("--check-shape", default="8b-2-layers", help="of the checked model")
    parser.add_argument("--vocab", type=int, default=128000, help="prompts are of ids below this")
    parser.add_argument("--adapters", type=int, default=256, help="of the measured model")
    parser.add_argument("--host", default="24GiB", help="host memory for adapters while cold ones are measured")
    parser.add_argument("--settle", type=float, default=20.0, help="seconds in which it is set aside")
    parser.add_argument("--thousand", type=int, default=1000, help="adapters of the phase of that name")
    parser.add_argument("--thousand-host", default="40GiB", help="host memory for them")
    parser.add_argument("--few-host", default="6GiB", help="host memory of the phase round-robin, which holds some of the adapters")
    parser.add_argument("--pairs", type=int, default=2, help="runs with and without broken sources, or arriving adapters")
    parser.add_argument("--crashes", type=int, default=1, help="shards to kill, every second two of them to stop")
    parser.add_argument("--rounds", type=int, default=3, help="requests a stream")
    parser.add_argument("--scale", type=float, default=1.0, help="of prompt and output lengths")
    parser.add_argument("--steady", type=int, default=320, help="tokens of streams during arrivals: two seconds' worth")
    parser.add_argument("--seconds", type=float, default=540.0, help="of the soak")
    parser.add_argument("--demo", type=Path, help="the demo model's GGUF file")
    parser.add_argument("--flags", type=shlex.split, default=[], help=f"of servers, beside or instead of {' '.join(FLAGS)}")
    parser.add_argument("--check-host", default="100MiB", help="host memory that holds some of the checked adapters")
    parser.add_argument("--soak-host", default="4GiB", help="host memory that holds some of the soaked adapters")
    parser.add_argument("--variant", action="append", default=[], help="NAME=FLAGS: a further server for check")
    args = parser.parse_args()
    if unknown := [p for p in args.phases if p not in PHASES and p not in LOADS]:
        parser.error(f"unknown: {' '.join(unknown)}")
    if "demo" in args.phases and not args.demo:
        parser.error("demo needs --demo")
    return args


def main() -> int:
    args = arguments()
    s = Session(args)
    gpu = card() if args.device != "cpu" else None
    s.say(dict(card=gpu))
    if "model" in args.phases:
        s.guard("model", lambda: make_model(s))
    asked = [name for phase in args.phases for name in GROUPS.get(phase, [phase]) if name in LOADS or name == "cold"]
    names = list(dict.fromkeys(asked))  # each once: a second run would find its prompts in the prefix cache
    if names:
        s.guard("loads", lambda: measure(s, names, None))
    if "slots" in args.phases:
        s.guard("slots", lambda: measure(s, GROUPS["many"], 32))
    further = {"loading": loading, "thousand": many_small, "round-robin": few_slots, "sources": broken_sources, "families": families}
    for name, phase in (further | dict(check=check_batches, reference=check_reference, demo=check_demo, crash=crash, soak=soak)).items():
        if name in args.phases:
            s.guard(name, lambda: phase(s))
    s.cut_log()
    comparable = args.shape == "8b" and args.device != "cpu" and args.scale == 1.0
    loads = measured(s.results, None, None)
    if loads:
        # Figures of another model or of scaled loads stand beside no others.
        print("\n".join(markdown(loads if comparable else [dict(load, card=None) for load in loads])))
    if comparable and "H100" in (gpu or ""):
        print("\n".join(filter(None, map(verdict, loads))))
    by_name = {r["load"]: r["tokens"] for r in loads}
    if comparable and {"base-32", "lora-32x32"} <= by_name.keys():
        print(f"32 adapters / none, 32 streams: {by_name['lora-32x32'] / by_name['base-32']:.3f}")
    for streams in (1, 32, 256):
        if {f"base-{streams}", f"json-{streams}"} <= by_name.keys():
            print(f"constrained / free, {streams} streams: {by_name[f'json-{streams}'] / by_name[f'base-{streams}']:.3f}")
    for r in s.results:
        if "check" in r:
            print(f"{'passed' if r['passed'] else 'FAILED'}  {r['check']}")
    s.failed += [r["check"] for r in s.results if r.get("passed") is False]
    s.failed += [f"{r['load']} ({r['errors']} requests)" for r in loads if r["errors"]]
    print("failed:", ", ".join(s.failed) or "none")
    return 1 if s.failed else 0


if __name__ == "__main__":
    sys.exit(main())

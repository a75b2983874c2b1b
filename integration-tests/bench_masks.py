#!/usr/bin/env python3
"""Measures what constrained answers cost on the CPU backend: a server with the demo model, free and constrained in turns.

Prints JSON: tokens per second of 32 streams whose answers are free and of 32 whose answers are JSON, for each pair of
runs and in the median, and how much later the first token comes when a request has a schema of 5 KB that the server
has not seen. Python's standard library only.
"""

import argparse
import http.client
import json
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from bench_cpu import ROOT, TARGET, Server

# No answer of 128 tokens ends it.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}
KINDS = [
    {"type": "string", "maxLength": 40},
    {"type": "integer", "minimum": 0, "maximum": 1000},
    {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 5},
    {"enum": ["red", "green", "blue", None]},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "format": "date-time"}]},
]


def unseen(size: int = 5000) -> dict:
    """Returns an object's schema of at least `size` bytes with properties of random names."""
    properties: dict = {}
    while len(json.dumps(properties)) < size:
        properties[f"{random.getrandbits(40):x}"] = random.choice(KINDS)
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def tokens_per_second(args: argparse.Namespace, server: Server, schema: dict | None) -> float:
    """Runs the load generator once."""
    host, port = server.address
    with tempfile.NamedTemporaryFile() as report:
        command = [args.bin / "lorax-bench", "--url", f"http://{host}:{port}", "--streams", args.streams, "--requests", 2 * args.streams]
        command += ["--prompt-tokens", 32, "--output-tokens", 128, "--json", report.name]
        command += ["--guided-json", json.dumps(schema)] if schema else []
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        result = json.loads(Path(report.name).read_text())
    return result["output_tokens_per_second"]


def first_token(server: Server, schema: dict | None) -> float:
    """Returns the milliseconds to the first token of a short prompt."""
    structure = {"guided_json": schema} if schema else {}
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 1, **structure})
    connection = http.client.HTTPConnection(*server.address)
    connection.connect()
    begun = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    seconds = time.perf_counter() - begun
    connection.close()
    if response.status != 200:
        raise SystemExit(answer.decode())
    return seconds * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=TARGET / "release", help="folder of the binaries")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench-masks.json")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--schemas", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as adapters:
        server = Server(args.bin, Path(adapters))
        try:
            tokens_per_second(args, server, None)
            tokens_per_second(args, server, SCHEMA)
            pairs = [(tokens_per_second(args, server, None), tokens_per_second(args, server, SCHEMA)) for _ in range(args.pairs)]
            delays = [(first_token(server, None), first_token(server, unseen())) for _ in range(args.schemas)]
        finally:
            server.process.terminate()
            server.process.wait()
    ratios = sorted(constrained / free for free, constrained in pairs)
    free, constrained = (statistics.median(times) for times in zip(*delays, strict=True))
    report = dict(
        streams=args.streams,
        tokens_per_second=[[round(rate, 1) for rate in pair] for pair in pairs],
        ratios=[round(ratio, 3) for ratio in ratios],
        ratio=round(statistics.median(ratios), 3),
        first_token_ms=dict(free=round(free, 1), unseen_schema=round(constrained, 1), later=round(constrained - free, 1)),
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

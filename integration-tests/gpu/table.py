#!/usr/bin/env python3
"""Prints the results of run.py as a markdown table for docs/benchmarks.md: one table a commit.

    integration-tests/gpu/table.py docs/benchmarks/h100.jsonl 988b562 --card "NVIDIA H100 80GB HBM3"

The figures of vLLM, docs/benchmarks/vllm.json, stand beside ours where they compare: the card is the same, and vLLM could
hold as many adapters at once as our server could, or the load does not have more adapters than that.
"""

import argparse
import json
from pathlib import Path

from loads import LOADS, PROMPT

VLLM = json.loads((Path(__file__).resolve().parents[2] / "docs/benchmarks/vllm.json").read_text())
DEFAULT_SLOTS = 128  # of --max-active-adapters
FIGURES = [("tokens", 0), ("ttft", 0), ("tpot", 2)]
HEADS = ["tokens/s", "first token p50, ms", "token p50, ms"]


def slots_of(flags: str) -> int:
    """The number of adapters that a server with these flags holds at once."""
    words = flags.split()
    return next((int(value) for flag, value in zip(words, words[1:]) if flag == "--max-active-adapters"), DEFAULT_SLOTS)


def measured(lines: list[dict], commit: str | None, card: str | None) -> list[dict]:
    """The loads of one commit, each with the card and the slots of the server that it ran on."""
    found, slots = [], DEFAULT_SLOTS
    for line in lines:
        if commit is not None and line.get("commit") != commit:
            continue
        card = line.get("card") or card
        if "ready_seconds" in line:
            slots = slots_of(line["flags"])
        if "load" in line:
            found.append(dict(line, card=card, slots=slots))
    return found


def peer(result: dict) -> dict | None:
    """What vLLM reached under the same load: the best of its runs, figure by figure. None where the two do not compare."""
    load = LOADS[result["load"].partition("/")[0]]
    most = VLLM["flags"]["max_loras"]
    if result["card"] != VLLM["card"] or result["adapters"] != load.adapters:
        return None
    if load.adapters > most and result["slots"] != most:
        return None
    runs = [run["loads"][load.name] for run in VLLM["runs"].values() if load.name in run["loads"]]
    best = {}
    for figure, choose in [("tokens", max), ("ttft", min), ("tpot", min)]:
        values = [run[figure] for run in runs if figure in run]
        best[figure] = choose(values) if values else None
    return best if runs else None


def spell(figures: dict | None) -> list[str]:
    """The cells of one server's figures."""
    values = [(figures and figures[name], digits) for name, digits in FIGURES]
    return ["–" if value is None else f"{value:.{digits}f}" for value, digits in values]


def describe(load: str) -> str:
    """A load in words."""
    it = LOADS[load.partition("/")[0]]
    streams = f"{it.streams} stream{'s' * (it.streams > 1)}"
    if it.adapters == 0:
        return f"{streams}, no adapter"
    adapters = f"{streams}, {it.adapters} adapter{'s' * (it.adapters > 1)}"
    how = {"zipf:1.1": ", Zipf 1.1", "round-robin": ", round robin"}.get(it.popularity, "")
    prompt = f", prompt of {it.prompt}" if it.prompt != PROMPT else ""
    return adapters + how + prompt + (", one token" if it.output == 1 else "")


def markdown(results: list[dict]) -> list[str]:
    """A table of loads, in the order in which run.py lists them. Without a comparable load vLLM's columns are left out."""
    peers = [peer(result) for result in results]
    beside = any(peers)
    head = ["load", "slots", *HEADS] + (["vLLM: `max_loras`", *HEADS] if beside else [])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    order = list(LOADS)
    for result, other in sorted(zip(results, peers), key=lambda pair: order.index(pair[0]["load"].partition("/")[0])):
        cells = [describe(result["load"]), str(result["slots"]) if result["adapters"] else "–", *spell(result)]
        if beside:
            cells += [str(VLLM["flags"]["max_loras"]) if other and result["adapters"] else "–", *spell(other)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="lines of run.py's results.jsonl")
    parser.add_argument("commits", nargs="*", help="commits to print, a table each; without any, all lines are printed in one table")
    parser.add_argument("--card", help="the GPU, if the lines do not say it")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.file.read_text().splitlines()]
    for commit in args.commits or [None]:
        found = measured(lines, commit, args.card)
        if not found:
            parser.error(f"no load of {commit or 'any commit'} in {args.file}")
        of = f"Commit {commit}" if commit else "All commits"
        print("\n".join([f"{of}, {found[0]['card'] or 'unknown card'}:", "", *markdown(found), ""]))


if __name__ == "__main__":
    main()

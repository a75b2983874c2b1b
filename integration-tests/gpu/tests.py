"""Tests of these scripts that need no server: python3 -m unittest discover -s integration-tests/gpu -p tests.py"""

import io
import json
import tempfile
import unittest
import urllib.error
import urllib.request
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

from check import EVICTED, batches, compare
from exchange import bad_hub
from loads import LOADS, Generator
from run import Session, merged
from table import VLLM, markdown, measured, slots_of

# A load generator that writes its arguments to a file beside itself and reports success.
GENERATOR = """#!/usr/bin/env python3
import json, sys
from pathlib import Path
with open(Path(__file__).with_name("calls.jsonl"), "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if "--json" in sys.argv:
    report = dict(output_tokens_per_second=1.0, ttft_ms=None, tpot_ms=None, gap_ms=None, jain_index=None, errors=0, seconds=1.0)
    Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(report) + "\\n")
"""


class Flags(unittest.TestCase):
    def test_later_flags_replace_earlier_ones_and_keep_the_others(self):
        self.assertEqual(merged(["--a", "1", "--b", "2"], ["--b", "3"], ["--c", "4"]), "--a 1 --b 3 --c 4".split())


class Results(unittest.TestCase):
    def test_every_line_names_the_commit_if_it_is_known(self):
        for commit, line in [(None, dict(load="base-1")), ("abc1234", dict(commit="abc1234", load="base-1"))]:
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
                out = Path(folder)
                Session(SimpleNamespace(commit=commit, out=out, work=out / "work")).say(dict(load="base-1"))
                self.assertEqual(json.loads((out / "results.jsonl").read_text()), line)


class Prompts(unittest.TestCase):
    def test_runs_on_one_server_have_seeds_of_their_own_that_stay_the_same(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "lorax-bench").write_text(GENERATOR)
            (folder / "lorax-bench").chmod(0o755)
            (folder / "adapters" / "a0").mkdir(parents=True)
            server = SimpleNamespace(url="http://localhost", adapters=folder / "adapters")
            generator = Generator(folder, server, 2000, folder, (1.0, 320))
            for _ in range(2):
                generator.touch(1)
                for name in ["base-1", "base-8"]:
                    generator.measure(LOADS[name], 1, "default")
            calls = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
        seeds = [call[call.index("--seed") + 1] for call in calls]
        self.assertEqual(len(set(seeds[:5])), 5)
        self.assertEqual(seeds[:5], seeds[5:])


def answer(ids: list[int], logprob: float = -1.0) -> list[dict]:
    """The tokens of an answer; token 7 is a near tie at each position."""
    return [dict(id=i, logprob=logprob, alternative_tokens=[dict(id=7, logprob=logprob - 0.01)]) for i in ids]


class Compare(unittest.TestCase):
    def compared(self, *got: list[dict]) -> dict:
        return compare("", [answer([1, 2, 3, 4])] * len(got), list(got))

    def test_the_share_of_compared_tokens_is_reported_and_must_not_be_small(self):
        same, late, early = answer([1, 2, 3, 4]), answer([1, 2, 3, 7]), answer([7, 2, 3, 4])
        for got, share, passed in [([same], 1.0, True), ([late], 1.0, True), ([same, early], 0.625, True), ([early], 0.25, False)]:
            result = self.compared(*got)
            self.assertEqual((result["compared"], result["wrong"], result["passed"]), (share, 0, passed))

    def test_another_token_or_log_probability_fails(self):
        self.assertEqual(self.compared(answer([1, 2, 3, 5]))["wrong"], 1)
        self.assertFalse(self.compared(answer([1, 2, 3, 5]))["passed"])
        self.assertFalse(self.compared(answer([1, 2, 3, 4], -1.1))["passed"])


class Evicted(unittest.TestCase):
    def test_adapters_must_have_been_read_more_than_once(self):
        for read, passed in [(2, False), (3, True)]:
            server = MagicMock(adapters_read=read)
            server.__enter__.return_value = server
            server.generate.return_value = dict(tokens=answer([1, 2]))
            results = batches(lambda _: server, ["a", "b"], {"default": [], EVICTED: []}, [])
            self.assertEqual([r["passed"] for r in results], [True] * 4 + [passed])


def load_line(load: str, **more) -> dict:
    """A load's line of results.jsonl."""
    adapters = LOADS[load.partition("/")[0]].adapters
    return dict(load=load, adapters=adapters, tokens=100.4, ttft=10.5, tpot=1.234, errors=0) | more


class Table(unittest.TestCase):
    CARD = VLLM["card"]

    def cells(self, line: dict, flags: str = "", card: str | None = CARD) -> list[str]:
        """The cells of a table of one load."""
        lines = [dict(card=card), dict(ready_seconds=1.0, flags=flags), line]
        return [cell.strip() for cell in markdown(measured(lines, None, None))[-1].strip("|").split("|")]

    def test_every_figure_of_the_peer_belongs_to_a_load(self):
        for run in VLLM["runs"].values():
            self.assertLessEqual(run["loads"].keys(), LOADS.keys())

    def test_slots_are_those_of_the_flags(self):
        for flags, slots in [("", 128), ("--eager true", 128), ("--max-active-adapters 32", 32), ("--a 1 --max-active-adapters 5", 5)]:
            self.assertEqual(slots_of(flags), slots)

    def test_the_peer_stands_beside_loads_that_compare(self):
        many, slots = load_line("many-zipf"), "--max-active-adapters 32"
        for line, flags, card, theirs in [
            (load_line("base-1"), "", self.CARD, ["–", "152", "25", "6.46"]),
            (load_line("lora-1x1"), "", self.CARD, ["32", "124", "31", "7.91"]),
            (load_line("lora-32x32"), "", self.CARD, ["32", "1238", "620", "21.30"]),
            (load_line("lora-256x32"), "", self.CARD, ["32", "3641", "1001", "61.50"]),
            (many | dict(load="many-zipf/32-slots"), slots, self.CARD, ["32", "1610", "903", "30.10"]),
            (many, slots, self.CARD, ["32", "1610", "903", "30.10"]),
            (many, "", self.CARD, []),  # 128 slots against 32
            (load_line("many-round-robin"), "--max-active-adapters 64", self.CARD, []),
            (load_line("first-token", tpot=None), "", self.CARD, []),  # vLLM was not asked for one token
            (load_line("lora-32x32"), "", "NVIDIA H200", []),
            (load_line("lora-32x32"), "", None, []),
            (load_line("lora-32x32", adapters=8), "", self.CARD, []),  # fewer adapters than the load wants
        ]:
            self.assertEqual(self.cells(line, flags, card)[5:], theirs, (line, flags, card))

    def test_our_cells_name_load_and_slots(self):
        for line, flags, cells in [
            (load_line("base-1"), "", ["1 stream, no adapter", "–"]),
            (load_line("lora-32x1"), "", ["32 streams, 1 adapter", "128"]),
            (load_line("many-round-robin/32-slots"), "--max-active-adapters 32", ["64 streams, 256 adapters, round robin", "32"]),
        ]:
            self.assertEqual(self.cells(line, flags)[:5], [*cells, "100", "10", "1.23"])
        self.assertEqual(self.cells(load_line("first-token", tpot=None))[4], "–")

    def test_a_table_is_of_one_commit_and_in_the_order_of_loads(self):
        lines = [
            load_line("lora-8x8", commit="a"),
            load_line("base-8", commit="b"),
            load_line("base-1", commit="a"),
        ]
        table = markdown(measured(lines, "a", None))
        self.assertEqual([row.split(" | ")[0] for row in table[2:]], ["| 1 stream, no adapter", "| 8 streams, 8 adapters"])
        self.assertEqual(measured(lines, "c", None), [])


class BadHubs(unittest.TestCase):
    def test_each_repository_fails_in_its_own_way(self):
        info, file = "api/models/bad/{}-1/revision/main", "bad/{}-1/resolve/sha/adapter_model.safetensors"
        with bad_hub() as address:

            def status(path: str, kind: str, timeout: float = 20.0) -> int | str:
                try:
                    with urllib.request.urlopen(f"{address}/{path.format(kind)}", timeout=timeout) as response:
                        response.read()
                        return response.status
                except urllib.error.HTTPError as error:
                    return error.code
                except TimeoutError:
                    return "late"

            answers = {kind: (status(info, kind), status(file, kind)) for kind in ["denied", "corrupt", "unknown"]}
            self.assertEqual(answers, dict(denied=(403, 403), corrupt=(200, 200), unknown=(404, 404)))
            with urllib.request.urlopen(f"{address}/{info.format('huge')}") as response:
                self.assertEqual(max(file["size"] for file in json.load(response)["siblings"]), 20 << 30)
            self.assertEqual(status(info, "hangs", timeout=0.2), "late")
            with urllib.request.urlopen(f"{address}/{file.format('drips')}") as response:
                self.assertEqual((response.length, response.read(1)), (1 << 20, b"\x01"))


if __name__ == "__main__":
    unittest.main()

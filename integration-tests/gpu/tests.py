"""Tests of these scripts that need no server: python3 -m unittest discover -s integration-tests/gpu -p tests.py"""

import json
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

from check import EVICTED, batches, compare
from loads import LOADS, Generator
from run import merged

# Notes its arguments beside itself and reports that all went well.
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
    """Tokens; 7 is nearly as probable everywhere."""
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


if __name__ == "__main__":
    unittest.main()

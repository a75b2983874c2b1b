"""Tests of these scripts that need no server: python3 -m unittest discover -s integration-tests/gpu -p tests.py"""

import json
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

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


if __name__ == "__main__":
    unittest.main()

"""Runs random load for minutes while adapters come and go and clients leave: no error, no growth of memory."""

import itertools
import json
import random
import shutil
import threading
import time
from pathlib import Path

from check import words
from server import Server

SAMPLE_SECONDS = 2.0
SLACK = 64 << 20  # bytes of growth that an allocator may cause


class Soak:
    """Clients, a thread that changes the folder of adapters, and samples of memory."""

    def __init__(self, server: Server, folder: Path, seconds: float, clients: int = 32):
        self.server, self.folder, self.end = server, folder, time.monotonic() + seconds
        self.seconds, self.clients = seconds, clients
        self.originals = sorted(p for p in folder.iterdir() if p.name.startswith("a"))
        self.lock = threading.Lock()
        self.visiting: dict[str, int] = {}  # adapters that come and go, and the requests that use them now
        self.done = self.left = self.tokens = self.visits = 0  # visits: requests that used such an adapter
        self.errors: list[str] = []
        self.samples: list[dict] = []

    def run(self) -> dict:
        """Runs clients and changes until the end, and returns the result."""
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(self.clients)]
        threads += [threading.Thread(target=self.change, args=(4,))]
        shards, begun = self.server.shards(), time.monotonic()
        for thread in threads:
            thread.start()
        try:
            while time.monotonic() < self.end:
                self.sample(begun)
                time.sleep(SAMPLE_SECONDS)
        finally:
            self.end = 0.0
            for thread in threads:
                thread.join()
        self.sample(begun)
        if self.server.shards() != shards:
            self.errors.append("a process was started again")
        growth = self.growth()
        steady = all(g["after"] <= g["before"] * 1.02 + SLACK for g in growth.values())
        return dict(
            check="soak",
            seconds=self.seconds,
            requests=self.done,
            left_early=self.left,
            visits=self.visits,
            output_tokens=self.tokens,
            errors=len(self.errors),
            error_samples=sorted(set(self.errors))[:5],
            memory=growth,
            passed=steady and not self.errors and min(self.done, self.left, self.visits) > 0,
        )

    def sample(self, begun: float) -> None:
        """Records the memory in use."""
        self.samples.append(dict(second=round(time.monotonic() - begun, 1), **self.server.memory()))

    def growth(self) -> dict:
        """Returns the largest use in the second quarter, when all pools have been filled, and in the last quarter."""
        quarter = len(self.samples) // 4
        names = self.samples[0].keys() - {"second"}
        if quarter == 0 or any(s.keys() - {"second"} != names for s in self.samples):
            raise RuntimeError(f"{len(self.samples)} samples of memory, too few or not of the same things")
        largest = lambda name, part: max(s[name] for s in part)
        return {
            name: dict(before=largest(name, self.samples[quarter : 2 * quarter]), after=largest(name, self.samples[-quarter:]))
            for name in sorted(names)
        }

    def change(self, most: int) -> None:
        """Adds and removes adapters until the end."""
        try:
            for count in itertools.count():
                if time.monotonic() > self.end:
                    return
                self.visit(f"visitor-{count}", self.originals[count % len(self.originals)], count, most)
                time.sleep(0.2)
        except Exception as error:  # without it the soak would go on and prove less
            self.errors.append(f"changing adapters: {type(error).__name__}: {error}")

    def visit(self, name: str, original: Path, count: int, most: int) -> None:
        """Copies an adapter under a new name, and removes those before the last few that nobody uses any more."""
        shutil.copytree(original, self.folder / name)
        weights = self.folder / name / "adapter_model.safetensors"
        with open(weights, "r+b") as f:  # another content: the last weight's low byte
            f.seek(-2, 2)
            f.write(bytes([count % 251]))
        with self.lock:
            self.visiting[name] = 0
            gone = [n for n, users in list(self.visiting.items())[:-most] if users == 0]
            for old in gone:
                del self.visiting[old]
        for old in gone:
            shutil.rmtree(self.folder / old)

    def client(self, seed: int) -> None:
        """Sends one request after the other until the end."""
        draw = random.Random(seed)
        while time.monotonic() < self.end:
            with self.lock:
                kind = draw.choice(["none", "known", "known", "visiting"])
                visitors = list(self.visiting)
                name = draw.choice(visitors) if kind == "visiting" and visitors else None
                if name:
                    self.visiting[name] += 1
            adapter = name or (draw.choice(self.originals).name if kind != "none" else None)
            try:
                self.request(draw, adapter)
                with self.lock:
                    self.visits += name is not None
            except Exception as error:  # whatever it is, it counts
                self.errors.append(f"{type(error).__name__}: {error}")
            if name:
                with self.lock:
                    self.visiting[name] -= 1

    def request(self, draw: random.Random, adapter: str | None) -> None:
        """Runs a stream of random length and sampling; one in eight is left early."""
        tokens, leave = draw.randint(1, 96), draw.random() < 0.125
        parameters = dict(adapter_id=adapter, max_new_tokens=tokens, ignore_eos_token=True)
        if draw.random() < 0.5:
            parameters |= dict(do_sample=True, temperature=0.9, top_p=0.95, repetition_penalty=1.1)
        body = dict(inputs=words(draw.randrange(1 << 30), draw.randint(1, 80)), parameters=parameters)
        connection = self.server.connect()
        try:
            connection.request("POST", "/generate_stream", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read().decode()}")
            events = 0
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                events += 1
                if leave and events > tokens // 2:
                    break
            else:
                leave = False  # it was not left before it ended
            if not leave and events != tokens:
                raise RuntimeError(f"{events} of {tokens} tokens came")
            with self.lock:
                self.done += 1
                self.left += leave
                self.tokens += events
        finally:
            connection.close()

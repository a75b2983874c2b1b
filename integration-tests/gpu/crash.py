"""Kills or stops a shard under load: running streams must get an error, requests must get 503, and then the next shard must serve."""

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

from check import words
from server import Refused, Server

CLIENTS, TOKENS = 16, 3000  # more tokens than a stream gets before the kill
FIRST_TOKENS_SECONDS, RECOVERY_SECONDS = 60.0, 120.0
PAUSE_SECONDS = 0.05  # between requests while there is no shard


class Crash:
    """Streams that are cut off by the kill, and requests that are repeated until the server answers again."""

    def __init__(self, server: Server):
        self.server = server
        self.begun = threading.Semaphore(0)  # streams that have had a token

    def run(self, rank: int = 0, how: signal.Signals = signal.SIGKILL) -> dict:
        """Sends a rank a signal when every stream has had a token, and waits for the first answer of the next group."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            streams = [pool.submit(self.stream, words(seed, 40)) for seed in range(CLIENTS)]
            self.wait_for_tokens(streams)
            memory = self.server.memory()
            killed = time.monotonic()
            os.kill(self.server.shards()[rank], how)
            recovered, meanwhile = self.recovery(killed)
            ends = [stream.result() for stream in streams]
        told = Counter(how for how, _ in ends)
        return dict(
            check=f"rank {rank} got {how.name} under load",
            memory_before=memory,
            memory_after=self.server.memory() if recovered else None,
            recovery_seconds=recovered,
            last_stream_ended_seconds=round(max(when for _, when in ends) - killed, 3),
            streams=told,
            meanwhile=meanwhile,
            passed=recovered is not None and told == {"error event": CLIENTS} and meanwhile.keys() == {"503"},
        )

    def wait_for_tokens(self, streams: list[Future]) -> None:
        """Waits until every stream has had a token."""
        deadline = time.monotonic() + FIRST_TOKENS_SECONDS
        for count in range(CLIENTS):
            if not self.begun.acquire(timeout=max(0.0, deadline - time.monotonic())):
                ended = [stream.result()[0] for stream in streams if stream.done()]
                raise RuntimeError(f"{count} of {CLIENTS} streams had a token in {FIRST_TOKENS_SECONDS:.0f} s; ended: {ended}")

    def recovery(self, since: float) -> tuple[float | None, Counter]:
        """Returns the seconds until a request is answered again, and counts how the requests before it ended."""
        meanwhile = Counter()
        while time.monotonic() < since + RECOVERY_SECONDS:
            try:
                self.server.generate("Hello", None, 4)
                return round(time.monotonic() - since, 2), meanwhile
            except Refused as refused:
                meanwhile[str(refused.status)] += 1
            except (OSError, ValueError, http.client.HTTPException) as error:
                meanwhile[type(error).__name__] += 1
            time.sleep(PAUSE_SECONDS)
        return None, meanwhile

    def stream(self, text: str) -> tuple[str, float]:
        """Runs a stream; returns how it ended, and when."""
        body = dict(inputs=text, parameters=dict(max_new_tokens=TOKENS, ignore_eos_token=True))
        connection = self.server.connect()
        try:
            connection.request("POST", "/generate_stream", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            how = self.read(response) if response.status == 200 else str(response.status)
        except (OSError, ValueError, http.client.HTTPException) as error:
            how = type(error).__name__
        finally:
            connection.close()
        return how, time.monotonic()

    def read(self, response: http.client.HTTPResponse) -> str:
        """Reads a stream to its end; returns how it ended."""
        events = 0
        lines = (line for line in response if line.startswith(b"data:"))
        for event in map(lambda line: json.loads(line[5:]), lines):
            if "error" in event:
                return "error event" if next(lines, None) is None else "events after an error"
            events += 1
            if events == 1:
                self.begun.release()
        return "answered" if events == TOKENS else "broken off"

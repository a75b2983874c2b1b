"""A shard that is killed under load: who was served gets an error, and the port answers again soon."""

import http.client
import json
import os
import signal
import threading
import time

from check import words
from server import Server

CLIENTS, TOKENS = 16, 256
WARM_SECONDS, RECOVERY_SECONDS = 2.0, 120.0


class Crash:
    """Streams that go on until the server is back, and what they were told."""

    def __init__(self, server: Server):
        self.server = server
        self.back = threading.Event()
        self.told: dict[str, int] = {}
        self.lock = threading.Lock()

    def run(self) -> dict:
        """Kills the shard amid streams, and waits for the first answer of the next one."""
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            time.sleep(WARM_SECONDS)
            killed = time.monotonic()
            os.kill(self.server.processes()["lorax-shard"], signal.SIGKILL)
            recovered = self.recovery(killed)
        finally:
            self.back.set()
            for thread in threads:
                thread.join()
        silent = [how for how in self.told if how not in ("answered", "503", "error event")]
        return dict(
            check="a shard killed under load",
            recovery_seconds=recovered,
            requests=self.told,
            passed=recovered is not None and not silent and self.told.get("error event", 0) > 0,
        )

    def recovery(self, since: float) -> float | None:
        """Seconds until a request is answered again."""
        while time.monotonic() < since + RECOVERY_SECONDS:
            try:
                self.server.generate("Hello", None, 4)
                return round(time.monotonic() - since, 2)
            except (RuntimeError, OSError, ValueError, http.client.HTTPException):
                time.sleep(0.1)
        return None

    def client(self, seed: int) -> None:
        """One stream after the other."""
        count = 0
        while not self.back.is_set():
            how = self.stream(words(1000 * seed + count, 40))
            with self.lock:
                self.told[how] = self.told.get(how, 0) + 1
            count += 1
            if how != "answered":
                self.back.wait(0.2)

    def stream(self, text: str) -> str:
        """How a stream ended."""
        body = dict(inputs=text, parameters=dict(max_new_tokens=TOKENS, ignore_eos_token=True))
        connection = self.server.connect()
        try:
            connection.request("POST", "/generate_stream", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                return str(response.status)
            events = [json.loads(line[5:]) for line in response if line.startswith(b"data:")]
            if events and "error" in events[-1]:
                return "error event"
            return "answered" if len(events) == TOKENS else "broken off"
        except (OSError, ValueError, http.client.HTTPException) as error:
            return type(error).__name__
        finally:
            connection.close()

"""A server under test: the launcher, its log, its memory, and requests to it. Python's standard library only."""

import http.client
import json
import os
import subprocess
import threading
import time
from pathlib import Path

READY_SECONDS = 240


class Server:
    """A launcher on a free port, waited for. Use as a context manager: it stops the server."""

    def __init__(self, binaries: Path, model: Path, adapters: Path, log: Path, flags: list[str]):
        command = [binaries / "lorax-launcher", "--model-id", model, "--adapter-dir", adapters]
        command += ["--hostname", "127.0.0.1", "--port", "0", *flags]
        begun = time.monotonic()
        self.process = subprocess.Popen(
            list(map(str, command)), stderr=subprocess.PIPE, text=True, errors="replace", env={**os.environ, "NO_COLOR": "1"}
        )
        self.adapters, self.tail, self.address = adapters, [], None
        self.listening = threading.Event()
        self.reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self.reader.start()
        self.listening.wait(READY_SECONDS)
        if self.address is None:
            self.stop()
            raise RuntimeError("the server did not start:\n" + "".join(self.tail))
        self.ready_seconds = time.monotonic() - begun
        self.url = f"http://{self.address}"

    def _read(self, log: Path) -> None:
        """Copies the log, and finds the address in it."""
        with open(log, "a", buffering=1) as out:
            out.write(f"$ {' '.join(self.process.args)}\n")
            for line in self.process.stderr:
                out.write(line)
                self.tail = self.tail[-30:] + [line]
                if "listening on " in line:
                    self.address = line.split("listening on ")[1].strip()
                    self.listening.set()
        self.listening.set()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends it, gently at first."""
        self.process.terminate()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def connect(self) -> http.client.HTTPConnection:
        """A connection of its own for one thread."""
        return http.client.HTTPConnection(self.address, timeout=300)

    def post(self, path: str, body: dict) -> dict:
        """One request and its whole answer."""
        connection = self.connect()
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {answer}")
            return answer
        finally:
            connection.close()

    def generate(self, text: str, adapter: str | None, tokens: int, prompt_scores: bool = False) -> dict:
        """Greedy answer with the ids and log-probabilities of its tokens, and the two most probable ones at each."""
        parameters = dict(adapter_id=adapter, max_new_tokens=tokens, ignore_eos_token=True, details=True)
        parameters |= dict(return_k_alternatives=2, decoder_input_details=prompt_scores)
        return self.post("/generate", dict(inputs=text, parameters=parameters))["details"]

    def _children(self) -> list[dict]:
        """What the system knows of the launcher's processes."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        texts = [Path(f"/proc/{pid}/status").read_text().splitlines() for pid in pids]
        return [dict(line.split(":", 1) for line in lines if ":" in line) for lines in texts]

    def child(self, name: str) -> int:
        """The process id of one of its processes."""
        return next(int(status["Pid"]) for status in self._children() if status["Name"].strip() == name)

    def memory(self) -> dict:
        """Resident bytes of its processes by name, and of the first GPU in use where there is one."""
        found = {status["Name"].strip(): int(status["VmRSS"].split()[0]) * 1024 for status in self._children()}
        gpu = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        try:
            found["device"] = int(subprocess.check_output(gpu, text=True).split()[0]) << 20
        except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
            pass  # no GPU in this machine
        return found

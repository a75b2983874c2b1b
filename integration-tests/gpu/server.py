"""A server under test: the launcher, its log, its memory, and requests to it. Python's standard library only."""

import http.client
import json
import os
import subprocess
import threading
import time
from pathlib import Path

READY_SECONDS = 240
PROGRAMS = {"lorax-router", "lorax-shard"}


class Refused(RuntimeError):
    """An answer that is not 200."""

    def __init__(self, status: int, answer: dict):
        super().__init__(f"{status}: {answer}")
        self.status = status


class Server:
    """A launcher on a free port that has become ready. As a context manager it stops the server, which must end in order."""

    def __init__(self, binaries: Path, model: Path, adapters: Path, log: Path, flags: list[str], environment: dict[str, str] | None = None):
        command = [binaries / "lorax-launcher", "--model-id", model, "--adapter-dir", adapters]
        command += ["--hostname", "127.0.0.1", "--port", "0", *flags]
        begun = time.monotonic()
        self.process = subprocess.Popen(
            list(map(str, command)), stderr=subprocess.PIPE, text=True, errors="replace", env={**os.environ, "NO_COLOR": "1", **(environment or {})}
        )
        self.adapters, self.tail, self.address = adapters, [], None
        self.adapters_read = 0  # from disk, by the shard's log
        self.on_cpu = dict(zip(flags[::2], flags[1::2], strict=True)).get("--device") == "cpu"
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
        """Copies the log; finds the address in it and counts adapters."""
        with open(log, "a", buffering=1) as out:
            out.write(f"$ {' '.join(self.process.args)}\n")
            for line in self.process.stderr:
                out.write(line)
                self.tail = self.tail[-30:] + [line]
                self.adapters_read += "adapter ready in host memory" in line
                if "listening on " in line:
                    self.address = line.split("listening on ")[1].strip()
                    self.listening.set()
        self.listening.set()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind, *_) -> None:
        code = self.stop()
        if code != 0 and kind is None:
            raise RuntimeError(f"the launcher ended with code {code}:\n" + "".join(self.tail))

    def stop(self) -> int:
        """Terminates the server, kills it if it does not end, and returns its exit code. Its last lines are in the log then."""
        self.process.terminate()
        try:
            code = self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.reader.join(10)  # longer where a child holds the pipe
        return code

    def connect(self) -> http.client.HTTPConnection:
        """Opens a connection, for one thread."""
        return http.client.HTTPConnection(self.address, timeout=300)

    def get(self, path: str) -> dict:
        """Returns the answer of a route."""
        return self.ask("GET", path)

    def post(self, path: str, body: dict) -> dict:
        """Sends one request and returns its whole answer."""
        return self.ask("POST", path, json.dumps(body))

    def ask(self, method: str, path: str, body: str | None = None) -> dict:
        """Sends one request and returns its whole answer."""
        connection = self.connect()
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            if response.status != 200:
                raise Refused(response.status, answer)
            return answer
        finally:
            connection.close()

    def generate(self, text: str, adapter: str | None, tokens: int, prompt_scores: bool = False) -> dict:
        """Returns a greedy answer with the ids and log-probabilities of its tokens, and the most probable ones at each."""
        parameters = dict(adapter_id=adapter, max_new_tokens=tokens, ignore_eos_token=True, details=True)
        parameters |= dict(return_k_alternatives=5, decoder_input_details=prompt_scores)
        return self.post("/generate", dict(inputs=text, parameters=parameters))["details"]

    def shards(self) -> list[int]:
        """Returns the process ids of the shards, by rank."""
        return sorted(int(status["Pid"]) for name, status in self._children() if name == "lorax-shard")

    def memory(self) -> dict[str, int]:
        """Returns the resident bytes of the router and of all shards and, if GPUs are in use, the bytes that are used of them."""
        children, found = self._children(), dict.fromkeys(sorted(PROGRAMS), 0)
        for name, status in children:
            found[name] += int(status["VmRSS"].split()[0]) * 1024
        return found | ({} if self.on_cpu else device_memory({int(status["Pid"]) for _, status in children}))

    def _children(self) -> list[tuple[str, dict[str, str]]]:
        """Returns /proc's status of the router and the shards, with their names. It is an error if either does not run."""
        if (code := self.process.poll()) is not None:
            raise RuntimeError(f"the launcher ended with code {code}")
        found = []
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended since
            status = dict(line.split(":", 1) for line in lines if ":" in line)
            if "VmRSS" in status:  # it has not ended
                found.append((status["Name"].strip(), status))
        if missing := PROGRAMS - {name for name, _ in found}:
            raise RuntimeError(f"not running: {' '.join(sorted(missing))}")
        return found


def card() -> str | None:
    """Returns the name of the first GPU; none on a machine without one."""
    try:
        return subprocess.check_output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], text=True).splitlines()[0]
    except FileNotFoundError:
        return None


def device_memory(pids: set[int]) -> dict[str, int]:
    """Returns the bytes that the driver counts for these processes, or for all GPUs if it does not tell them apart."""
    ask = lambda query: subprocess.check_output(["nvidia-smi", query, "--format=csv,noheader,nounits"], text=True)
    apps = [line.partition(",") for line in ask("--query-compute-apps=pid,used_memory").splitlines()]
    own = [used.strip() for pid, _, used in apps if pid.strip() in map(str, pids)]
    if own and all(used.isdecimal() for used in own):
        return dict(device=sum(map(int, own)) << 20)
    return dict(all_devices=sum(map(int, ask("--query-gpu=memory.used").split())) << 20)

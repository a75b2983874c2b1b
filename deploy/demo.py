#!/usr/bin/env python3
"""Serves the demo model and shows one prompt answered by the base model and by three adapters in one running batch.

Starts `lorax-launcher`, waits until it is ready, streams four answers at once, prints lines to try, and keeps serving
until Ctrl-C. `--once` ends after the show. Python's standard library only.
"""

import argparse
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
MODEL = CACHE / "lorax" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTERS = ROOT / "integration-tests" / "fixtures" / "adapters"
PROMPT = "Show the name of all ships."
NAMES = [None, "sentiment", "sql", "pirate"]
READY_SECONDS = 120
LIVE = sys.stdout.isatty()
BOLD, PLAIN, CLEAR = ("\033[1m", "\033[0m", "\033[2K") if LIVE else ("", "", "")


@dataclass
class Answer:
    """One streamed answer; filled by its own thread."""

    adapter: str | None
    text: str = ""
    sent: float = 0.0
    times: list[float] = field(default_factory=list)  # of each token, seconds
    error: str = ""
    done: bool = False

    @property
    def speed(self) -> float:
        """Tokens a second, first token apart."""
        span = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        return (len(self.times) - 1) / span if span else 0.0

    def stream(self, port: int) -> None:
        """Asks the server and collects tokens as they come."""
        body = {
            "model": self.adapter or str(MODEL),
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 48,
            "temperature": 0,
            "stream": True,
        }
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            headers = {"content-type": "application/json"}
            self.sent = time.monotonic()
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(response.read().decode())
            self.read(response)
        except (OSError, RuntimeError, ValueError) as error:
            self.error = str(error)
        self.done = True

    def read(self, response: http.client.HTTPResponse) -> None:
        """Reads server-sent events until the stream ends."""
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if not data.startswith("{"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"])
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    self.text += piece
                    self.times.append(time.monotonic())


def free_port(wanted: int) -> int:
    """`wanted` if nobody listens there, else any free port."""
    for port in (wanted, 0):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
                return s.getsockname()[1]
            except OSError:
                continue
    raise SystemExit("no free port")


def wait_until_ready(server: subprocess.Popen, port: int) -> None:
    """Polls /health; ends the program when the server has ended."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with code {server.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {READY_SECONDS} s")


def render(answers: list[Answer]) -> list[str]:
    """The four answers as lines of text, of a fixed number so that they can be drawn over."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = []
    for a in answers:
        state = a.error or (f"{len(a.times):3d} tokens  {a.speed:5.1f} tok/s" if a.times else "waiting")
        lines.append(f"{BOLD}{a.adapter or 'base model':<12}{PLAIN} {state}"[: width + len(BOLD + PLAIN)])
        wrapped = textwrap.wrap(" ".join(a.text.split()), width - 2)[:3]
        lines += ["  " + line for line in wrapped] + [""] * (3 - len(wrapped))
    return lines


def show(port: int) -> bool:
    """Streams the four answers at once; live on a terminal, once at the end otherwise. True if all came."""
    answers = [Answer(name) for name in NAMES]
    threads = [threading.Thread(target=a.stream, args=(port,), daemon=True) for a in answers]
    print(f"\nOne prompt, four models, one running batch:  {BOLD}{PROMPT}{PLAIN}\n")
    for t in threads:
        t.start()
    drawn = 0
    while LIVE and not all(a.done for a in answers):
        lines = render(answers)
        print((f"\033[{drawn}A" if drawn else "") + "".join(f"{CLEAR}{line}\n" for line in lines), end="")
        drawn = len(lines)
        time.sleep(0.05)
    for t in threads:
        t.join()
    print((f"\033[{drawn}A" if drawn else "") + "".join(f"{CLEAR}{line}\n" for line in render(answers)))
    times = [a.times for a in answers if a.times]
    if len(times) == len(answers):
        # The shortest answer has two tokens: it may end as the last one begins.
        together = max(min(t[-1] for t in times) - max(a.sent for a in answers), 0)
        total, span = sum(map(len, times)), max(t[-1] for t in times) - min(t[0] for t in times)
        print(f"All four ran together until the shortest ended after {together:.2f} s; {total / span:.0f} tokens/s in all.")
    return len(times) == len(answers)


def print_lines_to_try(port: int) -> None:
    """What a user can do next."""
    url = f"http://127.0.0.1:{port}"
    print(f"""
Still serving on {url}. Try:

  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "sql", "messages": [{{"role": "user", "content": "Show the name of all users."}}], "max_tokens": 32}}'

  python3 - <<'PY'   # pip install openai
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  for chunk in client.chat.completions.create(model="pirate", stream=True, max_tokens=64,
                                              messages=[{{"role": "user", "content": "What is a dog?"}}]):
      print(chunk.choices[0].delta.content or "", end="", flush=True)
  PY

Ctrl-C ends the server.""")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080, help="port to serve on; another one if it is taken")
    parser.add_argument("--once", action="store_true", help="end after the show")
    parser.add_argument("--bin", type=Path, default=TARGET / "release", help="folder of the binaries")
    args = parser.parse_args()
    port = free_port(args.port)
    command = [args.bin / "lorax-launcher", "--model-id", MODEL, "--adapter-dir", ADAPTERS]
    command += ["--adapter-source", "local", "--hostname", "127.0.0.1", "--port", port]
    server = subprocess.Popen(list(map(str, command)), start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        wait_until_ready(server, port)
        if not show(port):
            return 1
        if not args.once:
            print_lines_to_try(port)
            server.wait()
        return 0
    except KeyboardInterrupt:
        return 0
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())

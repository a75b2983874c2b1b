#!/usr/bin/env python3
"""Measures the speed of the CPU backend end to end: a server with the demo model, and clients that stream from it.

Prints JSON: tokens per second of one and of eight streams, base and with adapters, the time to the first token of a
512-token prompt, and the floor that the machine's read bandwidth and arithmetic imply, which are measured between the
runs. Each figure is the median of several runs. A shared machine's bandwidth can change by half from one second to the
next, so one stream is also put beside the bandwidth just before and just after it. Python's standard library only.
"""

import argparse
import json
import os
import random
import selectors
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
MODEL = CACHE / "lorax" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO = ROOT / "integration-tests" / "fixtures" / "adapters"
LAYERS, HIDDEN, FFN, KV = 30, 576, 1536, 192
SITES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, FFN),
    "mlp.up_proj": (HIDDEN, FFN),
    "mlp.down_proj": (FFN, HIDDEN),
}
RANKS = [4, 8, 16, 24, 32]
PARAMETERS = 134_515_008  # of the model; tied embeddings are read once a step, as the output projection
PROMPT_PARAMETERS = PARAMETERS - 49152 * HIDDEN  # a prompt's rows need no logits but the last
TOKENS = 128
ERROR = b'"error":'  # a key: quotes within JSON's strings are escaped


def random_bf16(count: int) -> bytes:
    """Returns `count` values of either sign between 0.008 and 0.03."""
    signs = bytes(0x3C | (b & 0x80) for b in range(256))
    out = bytearray(2 * count)
    out[0::2] = os.urandom(count)
    out[1::2] = os.urandom(count).translate(signs)
    return bytes(out)


def write_adapter(folder: Path, rank: int) -> None:
    """Writes a random adapter on all seven projections, in PEFT's format."""
    folder.mkdir(parents=True)
    config = dict(peft_type="LORA", r=rank, lora_alpha=rank, target_modules=[s.split(".")[1] for s in SITES], bias="none")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for layer in range(LAYERS):
        for site, (inputs, outputs) in SITES.items():
            for matrix, shape in (("A", [rank, inputs]), ("B", [outputs, rank])):
                end = at + 2 * shape[0] * shape[1]
                name = f"base_model.model.model.layers.{layer}.{site}.lora_{matrix}.weight"
                header[name] = dict(dtype="BF16", shape=shape, data_offsets=[at, end])
                at = end
    text = json.dumps(header).encode()
    with open(folder / "adapter_model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + random_bf16(at // 2))


class Server:
    """A launcher on a free port."""

    def __init__(self, binaries: Path, adapters: Path):
        command = [binaries / "lorax-launcher", "--model-id", MODEL, "--adapter-dir", adapters, "--port", "0"]
        command += ["--hostname", "127.0.0.1", "--device", "cpu", "--prefix-caching", "false"]
        self.process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
        for line in self.process.stderr:
            if "listening on " in line:
                host, port = line.split("listening on ")[1].strip().rsplit(":", 1)
                self.address = (host, int(port))
                break
        else:
            raise SystemExit(f"the server ended with code {self.process.wait()}")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def streams(self, requests: list[tuple[str | None, str, int]]) -> list[list[float]]:
        """The times of each request (adapter, prompt, tokens) and of its tokens, all at once.

        The server has both cores to itself but for this: one thread that counts events and parses nothing.
        """
        times, rests = [], []
        with selectors.DefaultSelector() as waiting:
            for i, (adapter, prompt, tokens) in enumerate(requests):
                parameters = dict(max_new_tokens=tokens, ignore_eos_token=True, adapter_id=adapter)
                body = json.dumps(dict(inputs=prompt, parameters=parameters)).encode()
                head = "POST /generate_stream HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-type: application/json\r\n"
                connection = socket.create_connection(self.address)
                times.append([time.perf_counter()])
                rests.append(b"")
                connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                waiting.register(connection, selectors.EVENT_READ, i)
            while waiting.get_map():
                for key, _ in waiting.select():
                    data, now = key.fileobj.recv(1 << 16), time.perf_counter()
                    *lines, rests[key.data] = (rests[key.data] + data).split(b"\n")
                    for line in lines:
                        if ERROR in line or line.startswith(b"HTTP/") and not line.startswith(b"HTTP/1.1 200"):
                            raise SystemExit((line + rests[key.data]).decode(errors="replace"))
                        if line.startswith(b"data:"):
                            times[key.data].append(now)
                    if not data:
                        waiting.unregister(key.fileobj)
                        key.fileobj.close()
        for (_, _, tokens), came in zip(requests, times, strict=True):
            if len(came) - 1 != tokens:
                raise SystemExit(f"{len(came) - 1} of {tokens} tokens came")
        return times

    def together(self, adapters: list[str | None]) -> float:
        """Returns the tokens a second of streams that run at the same time, from the last first token to the first last one."""
        requests = [(adapter, f"Story {i}. Once upon a time", TOKENS) for i, adapter in enumerate(adapters)]
        all_times = self.streams(requests)
        begin, end = max(times[1] for times in all_times), min(times[-1] for times in all_times)
        return sum(begin < t <= end for times in all_times for t in times[1:]) / (end - begin)

    def first_token(self, adapter: str | None) -> float:
        """Returns the seconds to the first token of a prompt of 512 tokens that was not sent before."""
        words = ["sea", "dog", "tree", "ship", "house", "red", "big", "cat"]  # a token each, with the space
        [times] = self.streams([(adapter, " ".join(random.choices(words, k=512)), 1)])
        return times[1] - times[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=TARGET / "release", help="folder of the binaries")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench-cpu.json")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    ceilings, of_floor = [], []
    ceiling = lambda: json.loads(subprocess.check_output([args.bin / "examples" / "machine"]))
    with tempfile.TemporaryDirectory() as tmp:
        adapters = Path(tmp)
        names = [path.name for path in sorted(DEMO.iterdir())] + [f"random-{rank}" for rank in RANKS]
        for path in DEMO.iterdir():
            shutil.copytree(path, adapters / path.name)
        for rank in RANKS:
            write_adapter(adapters / f"random-{rank}", rank)
        server = Server(args.bin, adapters)
        try:
            for adapter in [None, *names]:
                server.streams([(adapter, "Hello", 4)])
            loads = dict(
                one_base=lambda: server.together([None]),
                one_adapter=lambda: server.together(["pirate"]),
                eight_base=lambda: server.together([None] * 8),
                eight_adapters=lambda: server.together(names),
                first_token_base_s=lambda: server.first_token(None),
                first_token_adapter_s=lambda: server.first_token("pirate"),
            )
            # The kinds of run take turns, so that a slow moment of the machine affects all of them.
            figures = {name: [] for name in loads}
            for _ in range(args.runs):
                for name, load in loads.items():
                    if name == "one_base":
                        around = [ceiling()]
                    figures[name].append(load())
                    if name == "one_base":
                        around.append(ceiling())
                        ceilings += around
                        read = statistics.mean(c["read_gb_s"] for c in around)
                        of_floor.append(figures[name][-1] * 2 * PARAMETERS / read / 1e9)
        finally:
            server.process.terminate()
            server.process.wait()
    result = {name: round(statistics.median(values), 3) for name, values in figures.items()}
    machine = {name: statistics.median(c[name] for c in ceilings) for name in ceilings[0]}
    step = 2 * PARAMETERS / machine["read_gb_s"] / 1e9
    eight = max(step, 8 * 2 * PARAMETERS / machine["f32_gflops"] / 1e9)
    floor = dict(
        one=round(1 / step, 1),
        eight=round(8 / eight, 1),
        first_token_s=round(512 * 2 * PROMPT_PARAMETERS / machine["f32_gflops"] / 1e9, 3),
    )
    ratios = dict(
        one_base_of_floor=round(statistics.median(of_floor), 3),
        one_base_of_floor_runs=[round(share, 3) for share in of_floor],
        eight_adapters_of_one=round(result["eight_adapters"] / result["one_adapter"], 2),
    )
    report = dict(machine=machine, floor=floor, tokens_per_second_and_seconds=result, ratios=ratios)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

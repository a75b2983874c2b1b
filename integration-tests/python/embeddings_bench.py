#!/usr/bin/env python3
"""Embeds the 2,000 sentences of fixtures/embeddings with a server and with sentence-transformers, in turn, in one run.

    embeddings_bench.py URL FOLDER_OF_THE_MODEL MACHINE

URL is a server of the same model with --dtype float32, built for release. MACHINE is the program that measures what the
machine multiplies in f32 (`cargo build --release -p kernels --example machine`), which is run before each pass. Needs
sentence-transformers. Prints a line of JSON for each pass.
"""

import base64
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

SENTENCES = (Path(__file__).resolve().parent.parent / "fixtures/embeddings/sentences.txt").read_text().splitlines()
PASSES = 3


def serve(url: str) -> tuple[np.ndarray, int]:
    """One request with all sentences, in the format that OpenAI's own client asks for."""
    body = json.dumps(dict(input=SENTENCES, encoding_format="base64")).encode()
    request = urllib.request.Request(url + "/v1/embeddings", body, {"content-type": "application/json"})
    answer = json.load(urllib.request.urlopen(request, timeout=300))
    vectors = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]]
    return np.array(vectors), answer["usage"]["prompt_tokens"]


def measured_peak(machine: str) -> float:
    """GFLOP/s of multiply-adds in registers on all cores."""
    answer = subprocess.run([machine], capture_output=True, check=True, text=True).stdout
    return json.loads(answer)["f32_gflops"]


def main() -> None:
    url, folder, machine = sys.argv[1:]
    config = json.loads((Path(folder) / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    model = SentenceTransformer(folder, device="cpu")
    # What the projections multiply; attention comes on top and is not counted.
    per_token = 2 * layers * (4 * hidden * hidden + 2 * hidden * inner)
    for number in range(PASSES):
        peak = measured_peak(machine)
        for name in ("server", "sentence-transformers"):
            begun = time.perf_counter()
            if name == "server":
                vectors, tokens = serve(url)
            else:
                other = model.encode(SENTENCES, batch_size=32, show_progress_bar=False)
            seconds = time.perf_counter() - begun
            rate = per_token * tokens / seconds / 1e9
            line = dict(pass_=number, what=name, seconds=round(seconds, 3), tokens=tokens, gflops=round(rate, 1),
                        peak=peak, of_peak=round(rate / peak, 3))  # fmt: skip
            if name != "server":
                line["differs_by"] = float(np.abs(vectors - other).max())
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

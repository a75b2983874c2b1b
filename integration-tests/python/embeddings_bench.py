#!/usr/bin/env python3
"""Embeds the 2,000 sentences of fixtures/embeddings with a server and with sentence-transformers, in turn, in one run.

    embeddings_bench.py URL FOLDER_OF_THE_MODEL PEAK

URL is a server of the same model with --dtype float32. PEAK is what the machine multiplies in f32, in GFLOP/s:
`cargo run --release -p kernels --example machine`. Needs sentence-transformers. Prints a line of JSON for each pass.
"""

import json
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

SENTENCES = (Path(__file__).resolve().parent.parent / "fixtures/embeddings/sentences.txt").read_text().splitlines()
PASSES = 3


def serve(url: str) -> tuple[np.ndarray, int]:
    """One request with all sentences."""
    body = json.dumps(dict(input=SENTENCES, encoding_format="float")).encode()
    request = urllib.request.Request(url + "/v1/embeddings", body, {"content-type": "application/json"})
    answer = json.load(urllib.request.urlopen(request, timeout=300))
    return np.array([item["embedding"] for item in answer["data"]]), answer["usage"]["prompt_tokens"]


def main() -> None:
    url, folder, peak = sys.argv[1], sys.argv[2], float(sys.argv[3])
    config = json.loads((Path(folder) / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    model = SentenceTransformer(folder, device="cpu")
    # What the projections multiply; attention comes on top and is not counted.
    per_token = 2 * layers * (4 * hidden * hidden + 2 * hidden * inner)
    for number in range(PASSES):
        for name in ("server", "sentence-transformers"):
            begun = time.perf_counter()
            if name == "server":
                vectors, tokens = serve(url)
            else:
                other = model.encode(SENTENCES, batch_size=32, show_progress_bar=False)
            seconds = time.perf_counter() - begun
            rate = per_token * tokens / seconds / 1e9
            line = dict(pass_=number, what=name, seconds=round(seconds, 3), tokens=tokens, gflops=round(rate, 1),
                        of_peak=round(rate / peak, 3))  # fmt: skip
            if name != "server":
                line["differs_by"] = float(np.abs(vectors - other).max())
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

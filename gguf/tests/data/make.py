"""Writes quantized.gguf: for every block type, a tensor of random blocks and "<name>.f32", what ggml's own Python
package (pip install gguf) makes of it."""

from pathlib import Path

import gguf
import numpy as np

TYPES = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
# Byte offsets of the half-precision scales in a block; random bytes there would be NaN or huge.
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
          "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
ROWS, COLS = 2, 512


def main() -> None:
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(Path(__file__).with_name("quantized.gguf"), "llama")
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if name in SCALES:
            data = random.integers(0, 256, (ROWS * COLS // block, size), dtype=np.uint8)
            for at in SCALES[name]:
                data[:, at : at + 2] = random.normal(0, 0.1, (len(data), 1)).astype(np.float16).view(np.uint8)
            data = data.reshape(ROWS, -1)
        else:
            data = gguf.quantize(random.normal(size=(ROWS, COLS)).astype(np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        writer.add_tensor(f"{name}.f32", gguf.dequantize(data, kind).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()

"""Writes split-0000*-of-00003.gguf with ggml's own Python package (pip install gguf): a model in three files, of which
the first has nothing but metadata."""

from pathlib import Path

import gguf
import numpy as np

writer = gguf.GGUFWriter(Path(__file__).with_name("split.gguf"), "llama", split_max_tensors=2, small_first_shard=True)
writer.add_block_count(7)
for number, name in enumerate(["one", "two", "three", "four"]):
    writer.add_tensor(name, np.arange(number, number + 6, dtype=np.float32).reshape(2, 3))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

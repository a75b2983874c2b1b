#!/usr/bin/env python3
"""Random models of a given shape with a tokenizer, and random adapters of them, written as Hugging Face and PEFT would.

Weights are scaled so that activations keep their size through all layers. On a GPU the numbers are drawn there: sixteen
gigabytes take seconds.
"""

import argparse
import itertools
import json
import shutil
import string
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

BYTES_A_FILE = 2 << 30
WRITERS = 12


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, and what its family has beside a Llama's parts."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int = 131072
    family: str = "llama"
    tied: bool = False

    def sites(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's seven projections."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, query),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (query, self.hidden),
            "mlp.gate_proj": (self.hidden, self.ffn),
            "mlp.up_proj": (self.hidden, self.ffn),
            "mlp.down_proj": (self.ffn, self.hidden),
        }

    def norms(self) -> dict[str, int]:
        """Widths of a layer's norms."""
        norms = dict.fromkeys(["input_layernorm", "post_attention_layernorm"], self.hidden)
        if self.family == "gemma2":
            norms |= dict.fromkeys(["pre_feedforward_layernorm", "post_feedforward_layernorm"], self.hidden)
        if self.family == "qwen3":
            norms |= dict.fromkeys(["self_attn.q_norm", "self_attn.k_norm"], self.head_dim)
        return norms


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "8b-2-layers": Shape(4096, 14336, 2, 32, 8, 128, 128256),
    "qwen3-8b": Shape(4096, 12288, 36, 32, 8, 128, 151936, 40960, "qwen3"),
    "gemma2-9b": Shape(3584, 14336, 42, 16, 8, 256, 256000, 8192, "gemma2", tied=True),
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 128, 32000, 32768, "mistral"),
    "tiny": Shape(128, 352, 2, 4, 2, 32, 2048, 4096),
    "tiny-qwen3": Shape(128, 352, 2, 4, 2, 32, 2048, 4096, "qwen3"),
    "tiny-gemma2": Shape(128, 352, 2, 4, 2, 32, 2048, 4096, "gemma2", tied=True),
    "tiny-mistral": Shape(128, 352, 2, 4, 2, 32, 2048, 4096, "mistral"),
}
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
# What the published models of these families have in config.json beside their sizes.
FAMILIES = {
    "llama": dict(rope_theta=500000.0, rope_scaling=dict(LLAMA3, original_max_position_embeddings=8192), hidden_act="silu"),
    "qwen3": dict(rope_theta=1000000.0, hidden_act="silu"),
    "mistral": dict(rope_theta=10000.0, hidden_act="silu", sliding_window=4096),
    "gemma2": dict(
        rope_theta=10000.0,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=4096,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
}


def config(shape: Shape) -> dict:
    """config.json."""
    name = dict(llama="Llama", qwen3="Qwen3", mistral="Mistral", gemma2="Gemma2")[shape.family]
    return dict(
        FAMILIES[shape.family],
        architectures=[f"{name}ForCausalLM"],
        model_type=shape.family,
        bos_token_id=shape.vocab - 2,
        eos_token_id=shape.vocab - 1,
        hidden_size=shape.hidden,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn,
        max_position_embeddings=shape.max_positions,
        num_attention_heads=shape.heads,
        num_hidden_layers=shape.layers,
        num_key_value_heads=shape.kv_heads,
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape.tied,
        torch_dtype="bfloat16",
        vocab_size=shape.vocab,
    )


def byte_alphabet() -> list[str]:
    """Returns the printable characters that stand for the 256 bytes, in the order of GPT-2's table."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in kept] + [chr(0x100 + i) for i in range(256 - len(kept))]


def tokenizer(vocab: int) -> dict:
    """tokenizer.json: byte-level BPE whose further tokens are the words of two, three, four lower-case letters in order."""
    tokens, merges = byte_alphabet(), []
    words = (w for length in itertools.count(2) for w in itertools.product(string.ascii_lowercase, repeat=length))
    for word in itertools.islice(words, vocab - len(tokens) - len(SPECIAL)):
        text = "".join(word)
        tokens.append(text)
        merges.append([text[:-1], text[-1]])
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    special = [dict(id=len(tokens) + i, content=text, **flags) for i, text in enumerate(SPECIAL)]
    model = dict(type="BPE", vocab={token: i for i, token in enumerate(tokens + SPECIAL)}, merges=merges)
    return dict(version="1.0", added_tokens=special, pre_tokenizer=byte_level, decoder=byte_level, model=model)


class Random:
    """Returns normal numbers in bf16, as bytes; the same seed gives the same ones on the same device."""

    def __init__(self, seed: int):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def bytes(self, shape: tuple[int, ...], std: float) -> memoryview:
        """A tensor's data."""
        t = torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0.0, std, generator=self.generator)
        return memoryview(t.cpu().view(torch.uint8).numpy()).cast("B")


def ones(count: int) -> memoryview:
    """Weights of a norm."""
    return memoryview(torch.ones(count, dtype=torch.bfloat16).view(torch.uint8).numpy()).cast("B")


@dataclass(frozen=True)
class Tensor:
    """A tensor to draw; a norm's weight where `std` is None."""

    name: str
    shape: tuple[int, ...]
    std: float | None

    @property
    def size(self) -> int:
        """Bytes."""
        return 2 * torch.Size(self.shape).numel()


def write_file(path: Path, tensors: list[Tensor], seed: int) -> None:
    """Writes one safetensors file."""
    header, at = {}, 0
    for t in tensors:
        header[t.name] = dict(dtype="BF16", shape=t.shape, data_offsets=[at, at + t.size])
        at += t.size
    text = json.dumps(header).encode()
    random = Random(seed)
    with open(path, "wb", buffering=0) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            data = ones(t.shape[0]) if t.std is None else random.bytes(t.shape, t.std)
            while data:
                data = data[f.write(data) :]


def model_tensors(shape: Shape) -> list[Tensor]:
    """Returns all tensors of a model."""
    deep = (2 * shape.layers) ** -0.5  # what the layers add must not outgrow the embedding
    head = 0.02  # the `initializer_range` of these families
    # A table that is the output projection, too, has its size; Gemma multiplies its rows by the root of their width.
    tensors = [Tensor("model.embed_tokens.weight", (shape.vocab, shape.hidden), head if shape.tied else 1.0)]
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for norm, width in shape.norms().items():
            tensors.append(Tensor(f"{prefix}.{norm}.weight", (width,), None))
        for site, (inputs, outputs) in shape.sites().items():
            gain = deep if site.endswith(("o_proj", "down_proj")) else 1.0
            tensors.append(Tensor(f"{prefix}.{site}.weight", (outputs, inputs), gain * inputs**-0.5))
    tensors.append(Tensor("model.norm.weight", (shape.hidden,), None))
    if not shape.tied:
        tensors.append(Tensor("lm_head.weight", (shape.vocab, shape.hidden), head))
    return tensors


def step_bytes(shape: Shape) -> int:
    """Bytes of weights that a decode step reads: all but a table of which it takes single rows."""
    read = [t for t in model_tensors(shape) if shape.tied or t.name != "model.embed_tokens.weight"]
    return sum(t.size for t in read)


def write_model(folder: Path, shape: Shape, seed: int = 1) -> int:
    """Writes a whole model; returns its size in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files, size = [[]], 0
    for t in model_tensors(shape):
        if size + t.size > BYTES_A_FILE and files[-1]:
            files, size = files + [[]], 0
        files[-1].append(t)
        size += t.size
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write_file, [folder / n for n in names], files, itertools.count(seed * 1000)))
    total = sum(t.size for tensors in files for t in tensors)
    index = dict(
        metadata=dict(total_size=total),
        weight_map={t.name: name for name, tensors in zip(names, files) for t in tensors},
    )
    special = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    for name, content in {
        "model.safetensors.index.json": index,
        "tokenizer.json": tokenizer(shape.vocab),
        "tokenizer_config.json": special,
        "config.json": config(shape),  # last: a model that has it is whole
    }.items():
        (folder / name).write_text(json.dumps(content))
    return total


def adapter_config(lora_rank: int, targets: list[str]) -> dict:
    """adapter_config.json of an adapter on these projections."""
    settings = dict(peft_type="LORA", task_type="CAUSAL_LM", r=lora_rank, lora_alpha=lora_rank, bias="none")
    return dict(settings, target_modules=targets)


def write_adapter(folder: Path, shape: Shape, lora_rank: int, targets: list[str], seed: int) -> int:
    """Writes a random adapter on these projections; returns its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = []
    sites = {site: size for site, size in shape.sites().items() if site.split(".")[1] in targets}
    for layer, (site, (inputs, outputs)) in itertools.product(range(shape.layers), sites.items()):
        prefix = f"base_model.model.model.layers.{layer}.{site}"
        tensors.append(Tensor(f"{prefix}.lora_A.weight", (lora_rank, inputs), inputs**-0.5))
        tensors.append(Tensor(f"{prefix}.lora_B.weight", (outputs, lora_rank), 0.3 * lora_rank**-0.5))
    write_file(folder / "adapter_model.safetensors", tensors, seed)
    # Last: an adapter that has it is whole.
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(lora_rank, targets)))
    return sum(t.size for t in tensors)


def holds(path: Path, content: dict) -> bool:
    """Returns whether a JSON file exists; it must have this content if it does."""
    if not path.exists():
        return False
    if json.loads(path.read_text()) != content:
        raise SystemExit(f"{path} is of another shape or rank: remove it, or name another folder")
    return True


def write_adapters(folder: Path, shape: Shape, lora_ranks: list[int], targets: list[str]) -> int:
    """Writes adapters `a0`, `a1`, … of the given ranks and keeps those that exist. Returns the bytes written."""
    there = lambda i, r: holds(folder / f"a{i}" / "adapter_config.json", adapter_config(r, targets))
    missing = [(i, r) for i, r in enumerate(lora_ranks) if not there(i, r)]
    with ThreadPoolExecutor(WRITERS) as pool:
        sizes = pool.map(lambda one: write_adapter(folder / f"a{one[0]}", shape, one[1], targets, 7_000_000 + one[0]), missing)
    return sum(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gets model/ and the adapters; what is there already stays")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--ranks", type=lambda s: [int(r) for r in s.split(",")], default=[], help="of the adapters")
    parser.add_argument("--into", default="adapters", help="the folder of the adapters, beside model/")
    parser.add_argument("--targets", type=lambda s: s.split(","), help="projections of the adapters; all seven by default")
    args = parser.parse_args()
    shape, begun, written = SHAPES[args.shape], time.monotonic(), 0
    targets = args.targets or [site.split(".")[1] for site in shape.sites()]
    if not holds(args.folder / "model" / "config.json", config(shape)):
        written += write_model(args.folder / "model", shape)
    written += write_adapters(args.folder / args.into, shape, args.ranks, targets)
    sizes = dict(vocab=shape.vocab, step_bytes=step_bytes(shape))
    print(json.dumps(dict(sizes, bytes=written, seconds=round(time.monotonic() - begun, 2))))


if __name__ == "__main__":
    main()

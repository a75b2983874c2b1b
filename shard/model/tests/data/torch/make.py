"""Writes zip.bin and legacy.bin, what torch.save makes of tensors in every kind of storage and view, and
expected.safetensors, their elements in rows.

python make.py (torch 2.15, safetensors)"""

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def main() -> None:
    torch.manual_seed(5)
    base = torch.randn(6, 8)
    tensors = OrderedDict(
        f32=torch.randn(3, 5),
        f16=torch.randn(4, 3).half(),
        bf16=torch.randn(2, 7).bfloat16(),
        f64=torch.randn(3, 3).double(),
        vector=torch.randn(9),
        base=base,
        shared=base,
        rows=base[2:5],
        cols=base[:, 3:6],
        one_column=base[:, 4:5],
        every_other_row=base[::2],
        every_other_col=base[1:, 1::2],
        transposed=base.t(),
        transposed_part=base[1:4, 2:7].t(),
        diagonal=base.diagonal(),
        expanded=base[3].expand(4, 8),
        half_transposed=torch.randn(3, 4).half().t(),
        parameter=torch.nn.Parameter(torch.randn(2, 4)),
        buffer=torch.nn.Parameter(torch.randn(4, 4), requires_grad=False).data[1:, :2],
        empty=torch.zeros(0, 4),
    )
    others = OrderedDict(
        int64=torch.arange(12).reshape(3, 4), int32=torch.arange(4, dtype=torch.int32), uint8=torch.ones(3, dtype=torch.uint8),
        bool=torch.ones(2, 2, dtype=torch.bool), cube=torch.randn(2, 2, 2), number=torch.tensor(1.5),
        step=3, rate=0.5, big=1 << 70, negative=-(1 << 40), name="text", nothing=None, flags=[True, False], size=torch.Size([2, 3]),
    )
    state = OrderedDict(**tensors, **others)
    state._metadata = OrderedDict({"": {"version": 1}, "layer": {"version": 2}})
    torch.save(state, HERE / "zip.bin")
    torch.save(state, HERE / "legacy.bin", _use_new_zipfile_serialization=False)
    save_file({name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}, HERE / "expected.safetensors")


main()

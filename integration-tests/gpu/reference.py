#!/usr/bin/env python3
"""Reads cases from stdin, computes their log-probabilities with transformers and PEFT, prints the differences.

They are computed twice, from weights in bf16: in bf16, where every operation rounds, and in f32. The difference between the
two shows how exact the first one is. A case has an adapter's name or null, the ids of prompt and answer, and the
log-probabilities that the server gave them.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

NEAR = 0.06  # two tokens this close may change places


def load(folder: Path, adapters: Path, adapter: str | None, dtype: torch.dtype) -> torch.nn.Module:
    """Loads the model as PEFT runs it, unmerged. In f32 it has the weights that bf16 keeps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    if adapter:
        model = PeftModel.from_pretrained(model, adapters / adapter, autocast_adapter_dtype=False)
    # Not `model.to(dtype)`, which would round the frequencies of the rotary embedding, too.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
    return model.to(device).eval()


@torch.no_grad()
def score(model: torch.nn.Module, case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probabilities of all tokens but the first, and how far each token of the answer is behind the best one."""
    ids = torch.tensor([case["prompt"] + case["tokens"]], device=model.device)
    logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    answer = slice(len(case["prompt"]) - 1, None)
    return chosen.cpu(), (logprobs[answer].max(-1).values - chosen[answer]).cpu()


def compared(a: torch.Tensor, b: torch.Tensor) -> dict:
    """Returns the largest and the mean absolute difference."""
    difference = (a - b).abs()
    return dict(max=round(difference.max().item(), 5), mean=round(difference.mean().item(), 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", type=Path)
    args = parser.parse_args()
    cases = sorted(json.load(sys.stdin), key=lambda case: case["adapter"] or "")
    given = torch.tensor([x for case in cases for x in case["prompt_logprobs"] + case["logprobs"]])
    scores, tokens = {}, {}
    for dtype in (torch.bfloat16, torch.float32):
        found = []
        for name, group in itertools.groupby(cases, key=lambda case: case["adapter"]):
            model = load(args.model, args.adapters, name, dtype)
            found += [score(model, case) for case in group]
            del model
        name = str(dtype).removeprefix("torch.")
        scores[name] = torch.cat([chosen for chosen, _ in found])
        behind = torch.cat([behind for _, behind in found])
        near_ties, wrong = ((behind > 0) & (behind <= NEAR)).sum(), (behind > NEAR).sum()
        tokens[name] = dict(near_ties=near_ties.item(), wrong=wrong.item())
    bf16, f32 = scores["bfloat16"], scores["float32"]
    server = dict(to_bf16=compared(given, bf16), to_f32=compared(given, f32))
    print(json.dumps(dict(logprobs=len(given), **server, bf16_to_f32=compared(bf16, f32), tokens=tokens)))


if __name__ == "__main__":
    main()

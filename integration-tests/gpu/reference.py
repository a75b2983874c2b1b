#!/usr/bin/env python3
"""Reads cases from stdin, computes their log-probabilities with transformers and PEFT in bf16, prints the differences.

A case has an adapter's name or null, the ids of prompt and answer, and the log-probabilities that the server gave them.
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
    """The model as PEFT runs it, unmerged. In f32 it has the weights that bf16 keeps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    if adapter:
        model = PeftModel.from_pretrained(model, adapters / adapter, autocast_adapter_dtype=False)
        model = model.to(torch.bfloat16)
    return model.to(device=device, dtype=dtype).eval()


@torch.no_grad()
def differences(model: torch.nn.Module, case: dict) -> tuple[torch.Tensor, int, int]:
    """Absolute differences of all log-probabilities; tokens that are not the best; of these, those far from it."""
    ids = torch.tensor([case["prompt"] + case["tokens"]], device=model.device)
    logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    given = torch.tensor(case["prompt_logprobs"] + case["logprobs"], device=model.device)
    chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    answer = slice(len(case["prompt"]) - 1, None)
    behind = logprobs[answer].max(-1).values - chosen[answer]
    return (chosen - given).abs().cpu(), int((behind > 0).sum()), int((behind > NEAR).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", type=Path)
    args = parser.parse_args()
    cases = sorted(json.load(sys.stdin), key=lambda case: case["adapter"] or "")
    found = {torch.bfloat16: [], torch.float32: []}
    not_best = wrong = 0
    for name, group in itertools.groupby(cases, key=lambda case: case["adapter"]):
        group = list(group)
        for dtype, all_differences in found.items():
            model = load(args.model, args.adapters, name, dtype)
            for case in group:
                difference, second, far = differences(model, case)
                all_differences.append(difference)
                if dtype == torch.bfloat16:
                    not_best, wrong = not_best + second, wrong + far
            del model
    bf16, f32 = (torch.cat(all_differences) for all_differences in found.values())
    result = dict(
        logprobs=bf16.numel(),
        max_difference=bf16.max().item(),
        mean_difference=bf16.mean().item(),
        max_difference_to_f32=f32.max().item(),
        near_ties=not_best - wrong,
        wrong_tokens=wrong,
    )
    print(json.dumps({key: round(value, 5) for key, value in result.items()}))


if __name__ == "__main__":
    main()

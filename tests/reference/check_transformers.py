#!/usr/bin/env python3
"""Loads what `titanbit export` wrote for transformers and compares it with the models that it was written from.

    check_transformers.py DIRECTORY EXPECTED.safetensors [DIRECTORY EXPECTED.safetensors ...]

needs torch, transformers and accelerate, and a C++ compiler for torch.compile (or TORCHDYNAMO_DISABLE=1). EXPECTED holds
`ids` (tokens), `logits` (tokens x vocab, f32, by titanbit's training model), `greedy` (its greedy continuation of `ids`), and
`master.NAME`, the f32 weight of each projection before the export. Its metadata may have a `text`, which goes through the
tokenizer.

Prints a JSON object a pair: for float32 and for the type that from_pretrained chooses by itself, `median` and `largest` over
the positions of ||logits - expected|| / ||expected|| (an activation next to a half-way point may take another int8 code when
a sum is added in another order, which moves the logits from there on by about 1e-3), `argmax` = share of the positions where the likeliest token is the same, `greedy` = tokens
of the continuation before the first that differs; `codes` = ternary codes that differ from those of the masters, counted in
float64 from the paper's formula; `scale` = largest relative difference of a scale; `text_ids` and `text`, there and back.
"""

import json
import sys

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.bitnet import WeightQuant, unpack_weights


def codes_and_scale(module):
    """Codes and scale b of a projection, as transformers has them."""
    weight = module.weight
    if weight.dtype == torch.uint8:
        return unpack_weights(weight, dtype=torch.float32), 1 / module.weight_scale.double().item()
    quantized = WeightQuant.apply(weight.float()).double()
    scale = quantized.abs().max().item()
    return quantized.sign(), scale if scale > 0 else None


def compare_weights(model, expected):
    differing, largest = 0, 0.0
    for name in expected.keys():
        if not name.startswith("master."):
            continue
        master = expected.get_tensor(name).double()
        b = max(master.abs().mean().item(), 1e-5)
        module = model.get_submodule(name.removeprefix("master.").removesuffix(".weight"))
        codes, scale = codes_and_scale(module)
        differing += (codes != (master / b).round().clamp(-1, 1)).sum().item()
        if scale is not None:
            largest = max(largest, abs(scale / b - 1))
    return {"codes": differing, "scale": largest}


def compare_logits(model, expected):
    ids, want, greedy = (expected.get_tensor(name) for name in ("ids", "logits", "greedy"))
    ids = ids.long()[None]
    logits = model(ids).logits[0].float()
    new = model.generate(ids, max_new_tokens=len(greedy), do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    same = (new == greedy).tolist()
    errors = (logits - want).norm(dim=-1) / want.norm(dim=-1)
    return {
        "median": errors.median().item(),
        "largest": errors.max().item(),
        "argmax": (logits.argmax(-1) == want.argmax(-1)).float().mean().item(),
        "greedy": same.index(False) if False in same else len(same),
    }


@torch.no_grad()
def check(directory, expected_path):
    with safe_open(expected_path, "pt") as expected:
        exact = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        result = {"class": type(exact).__name__} | compare_weights(exact, expected)
        result["float32"] = compare_logits(exact, expected)
        result["default"] = compare_logits(AutoModelForCausalLM.from_pretrained(directory), expected)
        text = (expected.metadata() or {}).get("text")
        if text is not None:
            tokenizer = AutoTokenizer.from_pretrained(directory)
            ids = tokenizer(text)["input_ids"]
            result |= {"text_ids": ids, "text": tokenizer.decode(ids), "eos": tokenizer.eos_token_id}
    return result


if __name__ == "__main__":
    for pair in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(json.dumps(check(*pair)))

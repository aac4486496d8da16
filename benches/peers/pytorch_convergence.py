#!/usr/bin/env python3
"""Trains what a titanbit run trained, in PyTorch: same initial weights, same samples in the same order, same schedule.

    titanbit train --config FILE --out runs/a --max-steps 0      # writes the initial weights and the resolved config
    titanbit train --config FILE --out runs/a --resume latest
    python3 benches/peers/pytorch_convergence.py --run runs/a --out pytorch.jsonl

Nothing is shared with the Rust code but the formulas of the model, the sampler and the schedule. On a GPU activations
are bf16 and the model is compiled; on the CPU everything is f32. Prints a JSON object a step and the validation loss last.
Needs torch, numpy, pyyaml and safetensors; one data set in llm.c's u16 format.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

MASK = (1 << 64) - 1
HEADER_BYTES = 1024


class BitLinearFunction(torch.autograd.Function):
    """Exact integers in the forward product; STE: dX = dY . (wq b), dW = dY^T . (xq / s)."""

    @staticmethod
    def forward(ctx, x, w):
        s = 127.0 / x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        b = w.abs().mean().clamp(min=1e-5)
        xq = (x.float() * s).round().clamp(-128, 127).to(x.dtype)
        wq = (w / b).round().clamp(-1, 1).to(x.dtype)
        ctx.save_for_backward(xq, s, wq, b)
        return (F.linear(xq, wq).float() * b / s).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        xq, s, wq, b = ctx.saved_tensors
        dx = dy @ (wq * b.to(dy.dtype))
        x = (xq.float() / s).to(dy.dtype)
        return dx, (dy.flatten(0, -2).t() @ x.flatten(0, -2)).float()


def rms_norm(x, weight, eps):
    x32 = x.float()
    return x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x, cos, sin):
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


class Model(torch.nn.Module):
    def __init__(self, config, weights, dtype):
        super().__init__()
        self.c, self.dtype = config, dtype
        self.names = list(weights)
        self.values = torch.nn.ParameterList([torch.nn.Parameter(w.float()) for w in weights.values()])
        half = config["hidden_size"] // config["heads"] // 2
        angle = torch.arange(config["max_seq_len"]).float()[:, None] * (
            config["rope_theta"] ** (-torch.arange(half).double() / half)
        ).float()
        self.register_buffer("cos", angle.double().cos().float())
        self.register_buffer("sin", angle.double().sin().float())

    def layer(self, x, w, prefix):
        c, eps = self.c, self.c["rms_norm_eps"]
        get = lambda name: w[f"{prefix}{name}.weight"]
        bit = lambda x, name: BitLinearFunction.apply(x, get(name))
        norm = lambda x, name: rms_norm(x, get(name), eps).to(self.dtype)
        seq = x.shape[1]
        cos, sin = self.cos[:seq], self.sin[:seq]
        n = norm(x, "input_layernorm")
        head = c["hidden_size"] // c["heads"]
        q, k, v = (bit(n, f"self_attn.{p}_proj").unflatten(-1, (-1, head)).transpose(1, 2) for p in "qkv")
        a = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + bit(norm(a.transpose(1, 2).flatten(2), "self_attn.attn_sub_norm"), "self_attn.o_proj")
        n = norm(x, "post_attention_layernorm")
        gate, up = bit(n, "mlp.gate_proj").float(), bit(n, "mlp.up_proj").float()
        act = F.silu(gate) if c["activation"] == "silu" else F.relu(gate).square()
        f = rms_norm(act * up, get("mlp.ffn_sub_norm"), eps).to(self.dtype)
        return x + bit(f, "mlp.down_proj")

    def forward(self, ids, labels):
        w = dict(zip(self.names, self.values))
        embedding = w["model.embed_tokens.weight"]
        x = F.embedding(ids, embedding).to(self.dtype)
        for layer in range(self.c["layers"]):
            x = self.layer(x, w, f"model.layers.{layer}.")
        x = rms_norm(x, w["model.norm.weight"], self.c["rms_norm_eps"]).to(self.dtype)
        logits = F.linear(x, w.get("lm_head.weight", embedding).to(self.dtype))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def mix(key, value):
    z = (key + value * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def permute(index, n, key):
    half = ((n - 1).bit_length() + 1) // 2
    if half == 0:
        return index
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for step in range(6):
            left, right = right, left ^ (mix(key ^ step, right) & ((1 << half) - 1))
        index = left << half | right
        if index < n:
            return index


def numbers(tree):
    """YAML 1.1 reads 1e-8 as text."""
    if isinstance(tree, dict):
        return {key: numbers(value) for key, value in tree.items()}
    try:
        return float(tree) if isinstance(tree, str) else tree
    except ValueError:
        return tree


class Tokens:
    def __init__(self, path, seq, device):
        self.tokens = np.fromfile(path, dtype="<u2", offset=HEADER_BYTES)
        self.seq, self.device = seq, device
        self.windows = (len(self.tokens) - 1) // seq

    def batch(self, windows):
        rows = np.stack([self.tokens[w * self.seq : (w + 1) * self.seq + 1] for w in windows]).astype(np.int64)
        rows = torch.from_numpy(rows).to(self.device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def sample(self, first, count, seed):
        """Windows of samples first .. first + count: each epoch in an order of its own."""
        key = lambda epoch: mix(mix(mix(seed, 1), 0), epoch)
        return [permute(i % self.windows, self.windows, key(i // self.windows)) for i in range(first, first + count)]


def learning_rate(config, step):
    peak, schedule, steps = config["optimizer"]["lr"], config["schedule"], config["train"]["steps"]
    warmup = schedule["warmup_steps"]
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule["kind"] == "two_stage":
        if step < steps // 2:
            return peak
        start, top = steps // 2, schedule["stage2_lr"]
    elif schedule["kind"] == "wsd":
        start, top = max(steps - round(steps * schedule["decay_fraction"]), warmup), peak
    else:
        raise SystemExit(f"schedule {schedule['kind']}: only two_stage and wsd are written here")
    progress = min(max(step - start, 0) / max(steps - 1 - start, 1), 1.0)
    return top + (schedule["min_lr"] - top) * progress


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="run directory with checkpoints/step_0000000")
    parser.add_argument("--out", type=Path, required=True, help="file for one JSON object a step")
    parser.add_argument("--steps", type=int, help="stop early, with the schedule of the whole run")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()

    config = numbers(yaml.safe_load((args.run / "config.yaml").read_text()))
    train, optimizer = config["train"], config["optimizer"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weights = load_file(args.run / "checkpoints/step_0000000/model.safetensors")
    model = Model(config["model"], weights, dtype).to(device)
    matrices = [p for n, p in zip(model.names, model.values) if p.dim() == 2 and "embed_tokens" not in n]
    decayed = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "decays": True},
        {"params": [p for p in model.values if id(p) not in decayed], "weight_decay": 0.0, "decays": False},
    ]
    betas = (optimizer["beta1"], optimizer["beta2"])
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optimizer["eps"], fused=device == "cuda")
    loss_of = model if args.eager else torch.compile(model)

    data = Tokens(config["data"]["train"][0]["path"], train["seq_len"], device)
    rows, accum = train["micro_batch"], train["grad_accum"]
    started = time.perf_counter()
    with args.out.open("w") as out:
        for step in range(args.steps or train["steps"]):
            decay = optimizer["weight_decay"]
            if config["schedule"]["kind"] == "two_stage" and step >= train["steps"] // 2:
                decay = 0.0
            for group in adamw.param_groups:
                group["lr"] = learning_rate(config, step)
                group["weight_decay"] = decay if group["decays"] else 0.0
            total = 0.0
            for micro in range(accum):
                windows = data.sample((step * accum + micro) * rows, rows, train["seed"])
                loss = loss_of(*data.batch(windows)) / accum
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer["grad_clip"]).item()
            adamw.step()
            adamw.zero_grad()
            record = {"step": step + 1, "loss": total, "grad_norm": norm, "seconds": time.perf_counter() - started}
            out.write(json.dumps(record) + "\n")
            if (step + 1) % 50 == 0 or step == 0:
                print(json.dumps(record), flush=True)

        held_out = Tokens(config["data"]["val"], train["seq_len"], device)
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in range(config["eval"]["batches"]):
                windows = range(batch * rows, min((batch + 1) * rows, held_out.windows))
                if len(windows) > 0:
                    total += loss_of(*held_out.batch(windows)).item() * len(windows)
                    count += len(windows)
        record = {"val_loss": total / count if count else math.nan, "torch": torch.__version__}
        out.write(json.dumps(record) + "\n")
        print(json.dumps(record))


if __name__ == "__main__":
    main()

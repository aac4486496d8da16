#!/usr/bin/env python3
"""The PyTorch peer of the quickstart: the same BitNet model and optimizer, timed in training steps on the CPU.

    python3 -m venv venv && venv/bin/pip install torch numpy
    venv/bin/python benches/peers/pytorch_train.py --mode eager --steps 20
    venv/bin/python benches/peers/pytorch_train.py --mode compile --steps 20 --data train.bin

BitLinear is the usual fake quantisation (quantise, dequantise, `F.linear`), attention is PyTorch's fused kernel, AdamW its
foreach kernel. Prints one JSON object; tokens per second are those of the median step after the warm-up.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 4096, 256, 4, 4, 2, 768
SEQ, BATCH = 256, 8
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 3e-3, (0.9, 0.95), 0.1, 1.0
HEADER_WORDS, MAGIC_U16 = 256, 20240520  # llm.c's .bin


def straight_through(x, quantised):
    return x + (quantised - x).detach()


class BitLinear(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        s = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        b = self.weight.abs().mean().clamp(min=1e-5)
        x = straight_through(x, (x * s).round().clamp(-128, 127) / s)
        w = straight_through(self.weight, (self.weight / b).round().clamp(-1, 1) * b)
        return F.linear(x, w)


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        kv_size = HIDDEN // HEADS * KV_HEADS
        self.input_norm = nn.RMSNorm(HIDDEN, eps=1e-5)
        self.q, self.k, self.v = BitLinear(HIDDEN, HIDDEN), BitLinear(HIDDEN, kv_size), BitLinear(HIDDEN, kv_size)
        self.attn_sub_norm = nn.RMSNorm(HIDDEN, eps=1e-5)
        self.o = BitLinear(HIDDEN, HIDDEN)
        self.post_norm = nn.RMSNorm(HIDDEN, eps=1e-5)
        self.gate, self.up = BitLinear(HIDDEN, INTERMEDIATE), BitLinear(HIDDEN, INTERMEDIATE)
        self.ffn_sub_norm = nn.RMSNorm(INTERMEDIATE, eps=1e-5)
        self.down = BitLinear(INTERMEDIATE, HIDDEN)

    def forward(self, x, cos, sin):
        n = self.input_norm(x)
        q, k, v = (p(n).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(self.attn_sub_norm(a.transpose(1, 2).flatten(2)))
        n = self.post_norm(x)
        return x + self.down(self.ffn_sub_norm(F.silu(self.gate(n)) * self.up(n)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-5)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        half = HIDDEN // HEADS // 2
        angle = torch.arange(SEQ)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids, labels):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def read_tokens(path):
    """Token ids from llm.c's .bin (256 int32 header, then u16), or random ones without a path."""
    if path is None:
        return torch.randint(VOCAB, (1 << 20,))
    if np.fromfile(path, dtype="<i4", count=1)[0] != MAGIC_U16:
        raise SystemExit(f"{path}: not an llm.c u16 token file")
    tokens = np.fromfile(path, dtype="<u2", offset=HEADER_WORDS * 4).astype(np.int64)
    if tokens.max() >= VOCAB:
        raise SystemExit(f"{path}: token id {tokens.max()} is outside the vocabulary of {VOCAB}")
    return torch.from_numpy(tokens)


def batches(tokens):
    while True:
        starts = torch.randint(len(tokens) - SEQ, (BATCH,))
        window = torch.stack([tokens[s : s + SEQ + 1] for s in starts])
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", choices=["eager", "compile"], default="eager")
    parser.add_argument("--data", help="llm.c .bin of u16 tokens with a vocabulary of 4096; random ids without it")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Model()
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2] + [model.head.weight]
    decayed = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in decayed]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=1e-8,
        foreach=True,
    )
    forward = torch.compile(model) if args.mode == "compile" else model

    seconds, losses = [], []
    for _, (ids, labels) in zip(range(args.warmup + args.steps), batches(read_tokens(args.data))):
        start = time.perf_counter()
        loss = forward(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)

    median = statistics.median(seconds[args.warmup :])
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "mode": args.mode,
                "threads": args.threads,
                "steps": args.steps,
                "median_step_ms": round(median * 1e3, 1),
                "tokens_per_s": round(BATCH * SEQ / median, 1),
                "first_loss": round(losses[0], 4),
                "last_loss": round(losses[-1], 4),
            }
        )
    )


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Compares the draft's attention on a GPU with the plain form, including gradients: results and speed.

    tools/bench/attention.py --device cuda

`specbatch.drafts.attention.gpu` (FlexAttention, compiled) is compared with `specbatch.drafts.attention.cpu`, the
blockwise form, which runs on the same device in float32. Errors are relative to the largest value of each tensor. The
last line is JSON; the exit code is 1 if an error is above --tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2])]  # so that it runs from a checkout with torch and numpy

from specbatch.drafts import memory  # noqa: E402
from specbatch.drafts.attention import OwnKeys, PrefixMask, cpu, gpu  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 900, 130, 4096, 257, 128, 2048], help="samples")
    parser.add_argument("--live", type=float, default=0.4, help="share of the columns that are queries")
    parser.add_argument("--steps", type=int, default=3, help="later unrolled steps, whose keys only their column sees")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], help="query heads, key heads, width")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest error that bfloat16 explains")
    options = parser.parse_args()
    memory.CPU_BLOCK_SCORES = 1 << 28
    tensors, mask, indices = make_case(options)
    wide = [tensor.float() for tensor in tensors]
    found, seconds = run(gpu.attend, tensors, indices, mask)
    expected, plain_seconds = run(cpu.attend, wide, indices, mask)
    errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
    print(f"largest error: output {errors[0]:.1e}, gradients {max(errors[1:]):.1e}")
    print(f"forward and backward: {seconds * 1e3:.1f} ms in bfloat16, plain {plain_seconds * 1e3:.1f} ms in float32")
    torch_version, device = torch.__version__, torch.cuda.get_device_name()
    print(json.dumps({"errors": errors, "seconds": seconds, "plain_seconds": plain_seconds, "torch": torch_version,
                      "device": device}))  # fmt: skip
    sys.exit(max(errors) > options.tolerance)


def make_case(options: argparse.Namespace) -> tuple[list[Tensor], PrefixMask, list[Tensor | None]]:
    """Return queries, keys, values, and own keys of later steps, which some columns no longer have."""
    generator = torch.Generator().manual_seed(0)
    heads, groups, width = options.heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(options.device, torch.bfloat16)

    edges = torch.tensor([0, *options.lengths]).cumsum(0).tolist()
    rows = (torch.rand(edges[-1], generator=generator) < options.live).nonzero().flatten()
    made = []
    for _ in range(options.steps):
        made.append(rows)
        rows = rows[: max(1, len(rows) - 100)]
    indices = [None if len(m) == len(rows) else torch.searchsorted(m, rows).to(options.device) for m in made]
    own = [random(len(m), groups, width) for m in made for _ in range(2)]
    q, k, v = random(len(rows), heads, width), random(edges[-1], groups, width), random(edges[-1], groups, width)
    return [q, k, v, *own], PrefixMask(rows.to(options.device), tuple(pairwise(edges))), indices


def run(attend, tensors: list[Tensor], indices: list[Tensor | None], mask: PrefixMask) -> tuple[list[Tensor], float]:
    """Return the output, all gradients, and the seconds of the fastest of three runs."""
    best = float("inf")
    for _ in range(4):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        q, k, v, *own = leaves
        pairs = zip(own[::2], own[1::2], indices, strict=True)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        out = attend(q, k, v, [OwnKeys(key, value, index) for key, value, index in pairs], mask)
        towards = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        gradients = torch.autograd.grad(out, leaves, towards)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return [out.detach(), *gradients], best


if __name__ == "__main__":
    main()

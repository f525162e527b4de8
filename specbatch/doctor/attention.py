"""Checks that the attention for training and its gradients equal dense attention on this rank's device."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from specbatch.doctor.finding import Finding, failed
from specbatch.drafts.attention import OwnKeys, PrefixMask, attend

LENGTHS = (300, 129, 3, 80)
"""Tokens of the samples of a pack: some fill several blocks of a kernel, others less than one."""
LIVE = 3
"""One of this many columns is live."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference relative to the norm of the whole tensor, by rounding of the dtype."""


def attention(heads: int, kv_heads: int, width: int, device: torch.device) -> Finding:
    """Compare both on random columns.

    Args:
        heads: query heads of ``width`` values.
    """
    kind = "FlexAttention, compiled" if device.type == "cuda" else "the CPU's attention"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    ends = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    total = ends[-1]
    rows = torch.arange(0, total, LIVE, device=device)
    mask = PrefixMask(rows, tuple(pairwise(ends)))
    q, k, v = random(len(rows), heads, width), random(total, kv_heads, width), random(total, kv_heads, width)
    own = [OwnKeys(random(len(rows), kv_heads, width), random(len(rows), kv_heads, width), None)]
    leaves = [q, k, v, own[0].key_MGD, own[0].value_MGD]
    towards = torch.randn(len(rows), heads, width, generator=generator).to(device, dtype)
    out = attend(q, k, v, own, mask)
    found = [out, *torch.autograd.grad(out, leaves, towards)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    reference = dense(wide, mask)
    expected = [reference, *torch.autograd.grad(reference, wide, towards.double())]
    apart = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    what, text = "attention", f"{kind}: output {apart[0]:.1e}, gradients {max(apart[1:]):.1e} from dense attention"
    limit = TOLERANCE[dtype]
    if not max(apart) <= limit:
        return failed(
            what, text, f"at most {limit:g}", "drafts that are trained here would be wrong: use another kind of GPU, "
            "or another version of torch or Triton, and report it"
        )  # fmt: skip
    return Finding(what, text, f"at most {limit:g}")


def dense(leaves: list[Tensor], mask: PrefixMask) -> Tensor:
    """Compute attention with one softmax over all keys, and a mask of queries times keys.

    Args:
        leaves: queries, keys and values of the first step, and keys and values of the queries' own.
    """
    q, k, v, own_k, own_v = leaves
    each = q.shape[1] // k.shape[1]
    k, v, own_k, own_v = (x.repeat_interleave(each, 1) for x in (k, v, own_k, own_v))
    score = torch.einsum("nhd,rhd->nhr", q, k) / math.sqrt(q.shape[-1])
    key = torch.arange(len(k), device=q.device)
    sees = (mask.starts[:, None] <= key) & (key <= mask.row_N[:, None])
    score = score.masked_fill(~sees[:, None], float("-inf"))
    own = (q * own_k).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])
    weight = torch.cat([score, own], -1).softmax(-1)
    return torch.einsum("nhr,rhd->nhd", weight[..., :-1], v) + weight[..., -1:] * own_v


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the difference of two tensors relative to the norm of the expected one."""
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))

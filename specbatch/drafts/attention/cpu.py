"""Implements `attention` on a CPU: sample by sample and block by block.

The largest tensor is the scores of one block of columns, and only their log-sum-exp is kept for the backward pass, as
in FlashAttention (arXiv:2205.14135).

Shapes: as in `attention`, with ``S`` later steps and ``Q = H // G`` query heads a key head; ``n`` columns of a block.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specbatch.drafts import memory
from specbatch.drafts.attention.keys import OwnKeys, PrefixMask


def attend(q_NHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, own: Sequence[OwnKeys], prefix_mask: PrefixMask) -> Tensor:
    """Compute `attention.attend`."""
    own_keys, own_values = [step.key_MGD for step in own], [step.value_MGD for step in own]
    indices = [step.index_N for step in own]
    return _LiveAttention.apply(q_NHD, k_RGD, v_RGD, prefix_mask, indices, *own_keys, *own_values)


class _LiveAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q_NHD, k_RGD, v_RGD, prefix_mask: PrefixMask, indices: list[Tensor | None], *own: Tensor
    ) -> Tensor:
        """``own`` has the keys of all later steps, then their values."""
        out = torch.empty_like(q_NHD)
        lse_NH = q_NHD.new_empty(q_NHD.shape[:2], dtype=_wide(q_NHD.dtype))
        steps = len(indices)
        for block in _blocks(prefix_mask, q_NHD.shape[1]):
            own_k, own_v = _pick(own[:steps], indices, block), _pick(own[steps:], indices, block)
            score, own_score = _scores(q_NHD, k_RGD, own_k, prefix_mask.row_N, block)
            joined = torch.cat([score, own_score], -1) if steps else score
            lse = joined.logsumexp(-1, keepdim=True)
            weight = joined.sub_(lse).exp_().to(q_NHD.dtype)
            keys = score.shape[-1]
            value = weight[..., :keys] @ v_RGD[block.keys].transpose(0, 1)
            if steps:
                value += _own_values(weight[..., keys:], own_v)
            out[block.queries] = _ungroup(value, block.count)
            lse_NH[block.queries] = _ungroup(lse, block.count)[..., 0]
        ctx.save_for_backward(q_NHD, k_RGD, v_RGD, out, lse_NH, *own)
        ctx.prefix_mask, ctx.indices = prefix_mask, indices
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHD: Tensor):
        q, k, v, out, lse, *own = ctx.saved_tensors
        prefix_mask, indices, steps = ctx.prefix_mask, ctx.indices, len(ctx.indices)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_own = [torch.zeros_like(tensor) for tensor in own]
        heads, groups = q.shape[1], k.shape[1]
        scale = 1 / math.sqrt(q.shape[-1])
        for block in _blocks(prefix_mask, heads):
            own_k, own_v = _pick(own[:steps], indices, block), _pick(own[steps:], indices, block)
            score, own_score = _scores(q, k, own_k, prefix_mask.row_N, block)
            lse_b = _group(lse[block.queries, :, None], groups)
            grad = _group(grad_NHD[block.queries], groups)
            query = _group(q[block.queries], groups)
            delta = (grad.to(lse.dtype) * _group(out[block.queries], groups)).sum(-1, keepdim=True)
            key, value = k[block.keys].transpose(0, 1), v[block.keys].transpose(0, 1)
            weight = score.sub_(lse_b).exp_()
            dv[block.keys] += (weight.to(q.dtype).mT @ grad).transpose(0, 1)
            d_score = (grad @ value.mT).to(lse.dtype).sub_(delta).mul_(weight).mul_(scale).to(q.dtype)
            dk[block.keys] += (d_score.mT @ query).transpose(0, 1)
            d_query = d_score @ key
            if steps:
                own_weight = own_score.sub_(lse_b).exp_()
                d_own_score = (own_weight * (_own_scores(grad, own_v).to(lse.dtype) - delta) * scale).to(q.dtype)
                d_query += _own_values(d_own_score, own_k)
                _put(d_own[:steps], indices, block, _own_gradient(d_own_score, query, block.count))
                _put(d_own[steps:], indices, block, _own_gradient(own_weight.to(q.dtype), grad, block.count))
            dq[block.queries] = _ungroup(d_query, block.count)
        return dq, dk, dv, None, None, *d_own


class _Block:
    """Consecutive queries of one sample, and the keys that the last of them sees."""

    def __init__(self, first: int, end: int, first_key: int, end_key: int) -> None:
        self.queries, self.keys = slice(first, end), slice(first_key, end_key)
        self.count = end - first


def _blocks(prefix_mask: PrefixMask, heads: int) -> Iterator[_Block]:
    rows = prefix_mask.row_N.tolist()
    for first_key, end_key in prefix_mask.samples:
        first, end = bisect_left(rows, first_key), bisect_left(rows, end_key)
        size = max(1, memory.CPU_BLOCK_SCORES // (heads * (end_key - first_key)))
        for at in range(first, end, size):
            stop = min(at + size, end)
            yield _Block(at, stop, first_key, rows[stop - 1] + 1)


def _pick(own: Sequence[Tensor], indices: list[Tensor | None], block: _Block) -> Tensor:
    """Return the vectors that the columns of a block made in later steps, ``[S, n, G, D]``."""
    if not own:
        return torch.empty(0)
    parts = [
        tensor[block.queries if index is None else index[block.queries]]
        for tensor, index in zip(own, indices, strict=True)
    ]
    return torch.stack(parts)


def _put(d_own: Sequence[Tensor], indices: list[Tensor | None], block: _Block, gradient_SnGD: Tensor) -> None:
    """Add the gradient of what `_pick` returned to the gradients of its arguments."""
    for tensor, index, gradient in zip(d_own, indices, gradient_SnGD, strict=True):
        tensor[block.queries if index is None else index[block.queries]] = gradient


def _scores(q: Tensor, k: Tensor, own_k_SnGD: Tensor, row_N: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
    """Return scaled scores ``[G, n * Q, keys]`` and ``[G, n * Q, S]``, -inf where a key comes after its query."""
    groups = k.shape[1]
    wide, scale = _wide(q.dtype), 1 / math.sqrt(q.shape[-1])
    query = _group(q[block.queries], groups)
    score = (query @ k[block.keys].transpose(0, 1).mT).to(wide).mul_(scale)
    row_n = row_N[block.queries]
    # All queries see the keys up to the first query.
    seen = int(row_n[0]) + 1 - block.keys.start
    position = torch.arange(block.keys.start + seen, block.keys.stop, device=q.device)
    ahead = (position > row_n[:, None]).repeat_interleave(q.shape[1] // groups, 0)
    score[..., seen:].masked_fill_(ahead, float("-inf"))
    if not own_k_SnGD.numel():
        return score, score[..., :0]
    return score, _own_scores(query, own_k_SnGD).to(wide).mul_(scale)


def _own_scores(query: Tensor, own_SnGD: Tensor) -> Tensor:
    """Return the products of each query with its own column's vectors, ``[G, n * Q, S]``."""
    _, count, groups, width = own_SnGD.shape
    query_GnQD = query.view(groups, count, -1, width)
    return torch.einsum("gnqd,sngd->gnqs", query_GnQD, own_SnGD).flatten(1, 2)


def _own_values(weight: Tensor, own_SnGD: Tensor) -> Tensor:
    """Return the weighted sums of each column's own vectors, ``[G, n * Q, D]``."""
    count = own_SnGD.shape[1]
    weight_GnQS = weight.unflatten(1, (count, -1))
    return torch.einsum("gnqs,sngd->gnqd", weight_GnQS, own_SnGD).flatten(1, 2)


def _own_gradient(weight: Tensor, query: Tensor, count: int) -> Tensor:
    """Return the gradients of each column's own vectors, summed over its query heads, ``[S, n, G, D]``."""
    weight_GnQS, query_GnQD = weight.unflatten(1, (count, -1)), query.unflatten(1, (count, -1))
    return torch.einsum("gnqs,gnqd->sngd", weight_GnQS, query_GnQD)


def _group(x_nHD: Tensor, groups: int) -> Tensor:
    """Reshape ``[n, H, D]`` to ``[G, n * Q, D]``, which groups the query heads by key head."""
    count, heads, width = x_nHD.shape
    return x_nHD.view(count, groups, heads // groups, width).transpose(0, 1).reshape(groups, -1, width)


def _ungroup(x: Tensor, count: int) -> Tensor:
    """Reverse `_group`."""
    groups, _, width = x.shape
    return x.view(groups, count, -1, width).transpose(0, 1).reshape(count, -1, width)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

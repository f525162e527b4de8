"""Implements `attention` on a CPU: sample by sample and block by block.

The largest tensor is the scores of one block of columns, which the backward pass computes again, as in FlashAttention
(arXiv:2205.14135). The softmax is taken over the prefix and over the columns' own keys separately: what the prefix
weighs in the sum of both is kept. torch's softmax on a CPU is several times faster than its exponential.

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
        total_NH1 = q_NHD.new_empty((*q_NHD.shape[:2], 1), dtype=_wide(q_NHD.dtype))
        groups, steps, share_NH1 = k_RGD.shape[1], len(indices), None
        for block in _blocks(prefix_mask, q_NHD.shape[1]):
            query = _group(_scaled(q_NHD[block.queries]), groups)
            weight, total = _softmax_and_total(_scores(query, k_RGD, prefix_mask.row_N, block))
            value = _products(weight.to(q_NHD.dtype), v_RGD[block.keys].transpose(0, 1))
            out[block.queries] = _ungroup(value, block.count)
            total_NH1[block.queries] = _ungroup(total, block.count)
        if steps:
            own_k, own_v = _pick(own[:steps], indices), _pick(own[steps:], indices)
            own_score = _by_key_head(_scaled(q_NHD), groups) @ own_k.mT
            own_weight, own_total = _softmax_and_total(own_score.to(total_NH1.dtype))
            own_value = (own_weight.to(q_NHD.dtype) @ own_v).flatten(1, 2)
            share_NH1 = (total_NH1 - own_total.flatten(1, 2)).sigmoid()
            out = (share_NH1 * out + (1 - share_NH1) * own_value).to(out.dtype)
        ctx.save_for_backward(q_NHD, k_RGD, v_RGD, out, share_NH1, *own)
        ctx.prefix_mask, ctx.indices = prefix_mask, indices
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHD: Tensor):
        q, k, v, out, share_NH1, *own = ctx.saved_tensors
        prefix_mask, indices, steps = ctx.prefix_mask, ctx.indices, len(ctx.indices)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_own = [torch.zeros_like(tensor) for tensor in own]
        groups, wide = k.shape[1], _wide(q.dtype)
        delta_NH1 = (grad_NHD.to(wide) * out).sum(-1, keepdim=True)
        if share_NH1 is not None:
            own_k, own_v = _pick(own[:steps], indices), _pick(own[steps:], indices)
            query, grad, delta, share = (_by_key_head(x, groups) for x in (_scaled(q), grad_NHD, delta_NH1, share_NH1))
            own_weight = _softmax((query @ own_k.mT).to(wide)) * (1 - share)
            d_score = (own_weight * (grad @ own_v.mT - delta)).to(q.dtype)
            dq += (d_score @ own_k).flatten(1, 2)
            _put(d_own[:steps], indices, d_score.mT @ query)
            _put(d_own[steps:], indices, own_weight.to(q.dtype).mT @ grad)
            grad_NHD, delta_NH1 = (share_NH1 * grad_NHD).to(q.dtype), share_NH1 * delta_NH1
        for block in _blocks(prefix_mask, q.shape[1]):
            query, grad = _group(_scaled(q[block.queries]), groups), _group(grad_NHD[block.queries], groups)
            key, value = k[block.keys].transpose(0, 1), v[block.keys].transpose(0, 1)
            weight = _softmax(_scores(query, k, prefix_mask.row_N, block))
            dv[block.keys] += _products(weight.to(q.dtype).mT, grad).transpose(0, 1)
            d_weight = _products(grad, value.mT).to(wide)
            d_score = d_weight.sub_(_group(delta_NH1[block.queries], groups)).mul_(weight).to(q.dtype)
            dk[block.keys] += _products(d_score.mT, query).transpose(0, 1)
            dq[block.queries] += _ungroup(_products(d_score, key), block.count)
        return dq.mul_(1 / math.sqrt(q.shape[-1])), dk, dv, None, None, *d_own


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


def _pick(own: Sequence[Tensor], indices: list[Tensor | None]) -> Tensor:
    """Return the vectors that the columns made in later steps, ``[N, G, S, D]``."""
    return torch.stack([x if index is None else x[index] for x, index in zip(own, indices, strict=True)], 2)


def _put(d_own: Sequence[Tensor], indices: list[Tensor | None], gradient_NGSD: Tensor) -> None:
    """Store the gradient of what `_pick` returned in the gradients of its arguments."""
    for tensor, index, gradient in zip(d_own, indices, gradient_NGSD.unbind(2), strict=True):
        tensor[slice(None) if index is None else index] = gradient


def _scaled(q_NHD: Tensor) -> Tensor:
    """Return queries divided by the root of their width, as scores are."""
    return q_NHD * (1 / math.sqrt(q_NHD.shape[-1]))


def _scores(query: Tensor, k: Tensor, row_N: Tensor, block: _Block) -> Tensor:
    """Return scores ``[G, n * Q, keys]``, -inf where a key comes after its query.

    Args:
        query: scaled.
    """
    score = _products(query, k[block.keys].transpose(0, 1).mT).to(_wide(query.dtype))
    row_n = row_N[block.queries]
    # All queries see the keys up to the first query.
    seen = int(row_n[0]) + 1 - block.keys.start
    position = torch.arange(block.keys.start + seen, block.keys.stop, device=query.device)
    ahead = (position > row_n[:, None]).repeat_interleave(query.shape[1] // block.count, 0)
    score[..., seen:].masked_fill_(ahead, float("-inf"))
    return score


def _products(a_GNM: Tensor, b_GMK: Tensor) -> Tensor:
    """Return the matrix product of each key head."""
    if len(a_GNM) % torch.get_num_threads() == 0:
        return a_GNM @ b_GMK
    # In a batch, each thread computes whole products: some threads would wait for others.
    out = a_GNM.new_empty(len(a_GNM), a_GNM.shape[1], b_GMK.shape[2])
    for a, b, product in zip(a_GNM, b_GMK, out, strict=True):
        torch.mm(a, b, out=product)
    return out


def _softmax(score: Tensor) -> Tensor:
    """Return the softmax, which takes the place of the scores."""
    return torch.softmax(score, -1, out=score)


def _softmax_and_total(score: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same, and the logarithms of the denominators, ``[..., 1]``."""
    peak = score.amax(-1, keepdim=True)
    weight = _softmax(score)
    return weight, peak - weight.amax(-1, keepdim=True).log()


def _by_key_head(x_NHD: Tensor, groups: int) -> Tensor:
    """View ``[N, H, D]`` as ``[N, G, Q, D]``."""
    return x_NHD.unflatten(1, (groups, -1))


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

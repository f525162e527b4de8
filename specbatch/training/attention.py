"""Attention of live columns, sample by sample and block by block.

A column attends to the first unrolled step's keys of its sample up to its own position, and to its own keys
of later steps (EAGLE-3, arXiv:2503.01840, §3.2). Scores of one block of columns are the largest thing held,
and only their log-sum-exp is kept for the backward pass, as in FlashAttention (arXiv:2205.14135).

Shapes: ``N`` live columns, ``R`` columns with first-step keys, ``S`` later steps, ``H`` query heads,
``G`` key heads, ``Q = H // G`` query heads a key head, ``D`` head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_SCORES = 1 << 21
"""Most scores of one block, over all heads: 8 MiB of float32."""


class LiveAttention(torch.autograd.Function):
    """``softmax(q [k0; own_k]ᵀ / √D) [v0; own_v]`` with softmax in float32 or wider."""

    @staticmethod
    def forward(
        ctx,
        q_NHD: Tensor,
        k_RGD: Tensor,
        v_RGD: Tensor,
        own_k_SNGD: Tensor,
        own_v_SNGD: Tensor,
        row_N: Tensor,
        samples: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """
        Args:
            row_N: int64, ascending: which of the ``R`` columns each query is.
            samples: first and one past the last of the ``R`` columns of each sample.

        Returns:
            ``[N, H, D]`` in the queries' dtype.
        """
        out = torch.empty_like(q_NHD)
        lse_NH = q_NHD.new_empty(q_NHD.shape[:2], dtype=_wide(q_NHD.dtype))
        for block in _blocks(row_N, samples, q_NHD.shape[1]):
            score, own_score = _scores(q_NHD, k_RGD, own_k_SNGD, row_N, block)
            joined = torch.cat([score, own_score], -1)
            lse = joined.logsumexp(-1, keepdim=True)
            weight = joined.sub_(lse).exp_().to(q_NHD.dtype)
            keys = score.shape[-1]
            value = weight[..., :keys] @ v_RGD[block.keys].transpose(0, 1)
            if own_v_SNGD.shape[0]:
                value = value + _own_values(weight[..., keys:], own_v_SNGD[:, block.queries])
            out[block.queries] = _ungroup(value, block.count)
            lse_NH[block.queries] = _ungroup(lse, block.count)[..., 0]
        ctx.save_for_backward(q_NHD, k_RGD, v_RGD, own_k_SNGD, own_v_SNGD, row_N, out, lse_NH)
        ctx.samples = samples
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHD: Tensor):
        q, k, v, own_k, own_v, row, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_own_k, d_own_v = torch.empty_like(own_k), torch.empty_like(own_v)
        heads, groups = q.shape[1], k.shape[1]
        scale = 1 / math.sqrt(q.shape[-1])
        for block in _blocks(row, ctx.samples, heads):
            score, own_score = _scores(q, k, own_k, row, block)
            lse_b = _group(lse[block.queries, :, None], groups)
            grad = _group(grad_NHD[block.queries], groups)
            query = _group(q[block.queries], groups)
            delta = (grad * _group(out[block.queries], groups)).sum(-1, keepdim=True, dtype=lse.dtype)
            key, value = k[block.keys].transpose(0, 1), v[block.keys].transpose(0, 1)
            weight = score.sub_(lse_b).exp_()
            d_score = (weight * ((grad @ value.mT).to(lse.dtype) - delta) * scale).to(q.dtype)
            dv[block.keys] += (weight.to(q.dtype).mT @ grad).transpose(0, 1)
            dk[block.keys] += (d_score.mT @ query).transpose(0, 1)
            d_query = d_score @ key
            if own_k.shape[0]:
                own_k_b, own_v_b = own_k[:, block.queries], own_v[:, block.queries]
                own_weight = own_score.sub_(lse_b).exp_()
                d_own = (own_weight * (_own_scores(grad, own_v_b).to(lse.dtype) - delta) * scale).to(q.dtype)
                d_query = d_query + _own_values(d_own, own_k_b)
                d_own_k[:, block.queries] = _own_gradient(d_own, query, block.count)
                d_own_v[:, block.queries] = _own_gradient(own_weight.to(q.dtype), grad, block.count)
            dq[block.queries] = _ungroup(d_query, block.count)
        return dq, dk, dv, d_own_k, d_own_v, None, None


class _Block:
    """Neighbouring queries of one sample, and the keys that the last of them sees."""

    def __init__(self, first: int, end: int, first_key: int, end_key: int) -> None:
        self.queries, self.keys = slice(first, end), slice(first_key, end_key)
        self.count = end - first


def _blocks(row_N: Tensor, samples: tuple[tuple[int, int], ...], heads: int) -> Iterator[_Block]:
    rows = row_N.tolist()
    edges = torch.searchsorted(
        row_N, torch.tensor(samples, dtype=row_N.dtype, device=row_N.device).view(-1, 2)
    ).tolist()
    for (first_key, end_key), (first, end) in zip(samples, edges, strict=True):
        size = max(1, BLOCK_SCORES // (heads * (end_key - first_key)))
        for at in range(first, end, size):
            stop = min(at + size, end)
            yield _Block(at, stop, first_key, rows[stop - 1] + 1)


def _scores(q: Tensor, k: Tensor, own_k: Tensor, row: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
    """``[G, n * Q, keys]`` and ``[G, n * Q, S]``: scaled scores, -inf where a key lies ahead of its query."""
    groups = k.shape[1]
    wide, scale = _wide(q.dtype), 1 / math.sqrt(q.shape[-1])
    query = _group(q[block.queries], groups)
    score = (query @ k[block.keys].transpose(0, 1).mT).to(wide).mul_(scale)
    position = torch.arange(block.keys.start, block.keys.stop, device=q.device)
    ahead = (position > row[block.queries, None]).repeat_interleave(q.shape[1] // groups, 0)
    score.masked_fill_(ahead, float("-inf"))
    return score, _own_scores(query, own_k[:, block.queries]).to(wide).mul_(scale)


def _own_scores(query: Tensor, own_SnGD: Tensor) -> Tensor:
    """``[G, n * Q, S]``: products of each query with its own column's vectors."""
    _, count, groups, width = own_SnGD.shape
    query_GnQD = query.view(groups, count, -1, width)
    return torch.einsum("gnqd,sngd->gnqs", query_GnQD, own_SnGD).flatten(1, 2)


def _own_values(weight: Tensor, own_SnGD: Tensor) -> Tensor:
    """``[G, n * Q, D]``: each column's own vectors, weighted."""
    count = own_SnGD.shape[1]
    weight_GnQS = weight.unflatten(1, (count, -1))
    return torch.einsum("gnqs,sngd->gnqd", weight_GnQS, own_SnGD).flatten(1, 2)


def _own_gradient(weight: Tensor, query: Tensor, count: int) -> Tensor:
    """``[S, n, G, D]``: what the query heads of a column give back to its own vectors."""
    weight_GnQS, query_GnQD = weight.unflatten(1, (count, -1)), query.unflatten(1, (count, -1))
    return torch.einsum("gnqs,gnqd->sngd", weight_GnQS, query_GnQD)


def _group(x_nHD: Tensor, groups: int) -> Tensor:
    """``[n, H, D]`` to ``[G, n * Q, D]``: query heads of a key head beside each other."""
    count, heads, width = x_nHD.shape
    return x_nHD.view(count, groups, heads // groups, width).transpose(0, 1).reshape(groups, -1, width)


def _ungroup(x: Tensor, count: int) -> Tensor:
    """The reverse of `_group`."""
    groups, _, width = x.shape
    return x.view(groups, count, -1, width).transpose(0, 1).reshape(count, -1, width)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

"""Implements `attention` on a GPU: FlexAttention over the first step's keys, own keys merged in afterwards.

Live columns are gathered rows, so a causal mask over row numbers would be wrong, and a dense mask would rule out the
flash kernel. The mask uses positions instead: query ``n`` sees the keys from ``start[n]`` to ``row[n]``. Key blocks
that no query of a block sees are skipped, and key blocks that all of them see need no mask.

FlexAttention returns its log-sum-exp with the output, and accepts gradients of both. With it, the few own keys are
merged into the same softmax exactly (`Merge`). Sizes are dynamic: one compilation serves packs of all sizes.

On an NVIDIA H200 with torch 2.11, the compiled form and its gradients agree with the plain form in float32 to bfloat16
accuracy, in a third of its time (`tools/bench/attention.py`). Tests have no GPU. They check FlexAttention's uncompiled
form, with its gradients and `Merge`, against dense attention; the block mask, in both directions; the kernels that
torch generates of both passes for an H100, compiled for it and run in Triton's interpreter; and the step around it on
the meta device.

Shapes: as in `attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from specbatch.drafts.attention.keys import OwnKeys, PrefixMask
from specbatch.drafts.fused import Fused

BLOCK = 128
"""Number of queries, and of keys, in a block."""

_compiled = torch.compile(flex_attention, dynamic=True)

Kernel = Callable[[Tensor, Tensor, Tensor, PrefixMask], tuple[Tensor, Tensor]]


def attend(
    q_NHD: Tensor,
    k_RGD: Tensor,
    v_RGD: Tensor,
    own: Sequence[OwnKeys],
    prefix_mask: PrefixMask,
    *,
    prefix: Kernel | None = None,
) -> Tensor:
    """Compute `attention.attend`.

    Args:
        prefix: attention over the first step's keys alone: output ``[N, H, D]`` and log-sum-exp ``[N, H]``, both
            differentiable. Default: FlexAttention.
    """
    out, lse = (prefix or flex_prefix)(q_NHD, k_RGD, v_RGD, prefix_mask)
    if not own:
        return out
    own_keys, own_values = [step.key_MGD for step in own], [step.value_MGD for step in own]
    return Merge.apply(q_NHD, out, lse, [step.index_N for step in own], *own_keys, *own_values)


def flex_prefix(
    q_NHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, prefix_mask: PrefixMask, *, kernel: Callable[..., Tensor] = _compiled
) -> tuple[Tensor, Tensor]:
    """Compute attention over the first step's keys with FlexAttention.

    Args:
        kernel: FlexAttention, compiled or not.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHD, k_RGD, v_RGD))
    out, aux = kernel(
        q, k, v, block_mask=block_mask(prefix_mask, k_RGD.shape[0]), enable_gqa=True, return_aux=AuxRequest(lse=True),
        # The same kernel for all sizes: few queries would get a kernel of their own, and thus another compilation.
        kernel_options={"BACKEND": "TRITON"},
    )  # fmt: skip
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)


def block_mask(prefix_mask: PrefixMask, keys: int) -> BlockMask:
    """Return which keys each query sees, without allocating queries times keys.

    Args:
        keys: ``R``.
    """
    row, start = prefix_mask.row_N, prefix_mask.starts
    count = len(row)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (start[query] <= key) & (key <= row[query])

    # Rows and starts both ascend, so the first and the last query of a block bound the keys that it sees.
    first = torch.arange(0, count, BLOCK, device=row.device)
    last = (first + BLOCK).clamp(max=count) - 1
    block = torch.arange(-(-keys // BLOCK), device=row.device)
    some = (start[first, None] // BLOCK <= block) & (block <= row[last, None] // BLOCK)
    whole = (start[last, None] <= block * BLOCK) & (block * BLOCK + BLOCK - 1 <= row[first, None])
    partial_count, partial = _listed(some & ~whole)
    whole_count, wholes = _listed(whole)
    return BlockMask.from_kv_blocks(
        partial_count, partial, whole_count, wholes, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(count, keys)
    )


class Merge(torch.autograd.Function):
    """Merges own keys into attention over other keys by its log-sum-exp, as if all were in one softmax."""

    @staticmethod
    def forward(ctx, q_NHD: Tensor, out_NHD: Tensor, lse_NH: Tensor, indices: list[Tensor | None], *own: Tensor):
        """``own`` has the keys of all later steps, then their values."""
        steps = len(indices)
        own_k, own_v = own[:steps], own[steps:]
        scores = [own_score(q_NHD, _take(k, index)) for k, index in zip(own_k, indices, strict=True)]
        total = torch.stack([lse_NH.to(scores[0].dtype), *scores]).logsumexp(0)
        mixed = weighted(out_NHD, (lse_NH - total).exp())
        for v, index, score in zip(own_v, indices, scores, strict=True):
            mixed += weighted(_take(v, index), (score - total).exp(), q_NHD.shape[1])
        merged = mixed.to(q_NHD.dtype)
        ctx.save_for_backward(q_NHD, out_NHD, lse_NH, total, merged, *own)
        ctx.indices = indices
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHD: Tensor):
        q, out, lse, total, merged, *own = ctx.saved_tensors
        steps = len(ctx.indices)
        heads, dtype = q.shape[1], q.dtype
        delta = dot(grad_NHD, merged)
        weight = (lse - total).exp()
        d_out = weighted(grad_NHD, weight).to(out.dtype)
        d_lse = ((dot(grad_NHD, out) - delta) * weight).to(lse.dtype)
        d_q = torch.zeros_like(q, dtype=total.dtype)
        d_own: list[Tensor] = []
        for k, v, index in zip(own[:steps], own[steps:], ctx.indices, strict=True):
            key, value = _take(k, index), _take(v, index)
            own_weight = (own_score(q, key) - total).exp()
            d_score = (dot(grad_NHD, value) - delta) * own_weight / math.sqrt(q.shape[-1])
            d_q += weighted(key, d_score, heads)
            d_own.append(_give(k, index, of_group(q, d_score, k.shape[1]).to(k.dtype)))
            d_own.append(_give(v, index, of_group(grad_NHD, own_weight, v.shape[1]).to(v.dtype)))
        return d_q.to(dtype), d_out, d_lse, None, *d_own[::2], *d_own[1::2]


@Fused
def dot(a_NHD: Tensor, b: Tensor) -> Tensor:
    """``[N, H]``, float32 or wider: products of vectors; those of ``b [N, G or H, D]`` serve ``H // G`` heads each."""
    wide = torch.promote_types(a_NHD.dtype, torch.float32)
    count, heads, width = a_NHD.shape
    grouped = a_NHD.to(wide).reshape(count, b.shape[1], heads // b.shape[1], width)
    return (grouped * b.to(wide)[:, :, None]).sum(-1).reshape(count, heads)


@Fused
def own_score(q_NHD: Tensor, key_NGD: Tensor) -> Tensor:
    """``[N, H]``, float32 or wider: scaled scores of each column's query heads with a key of its own."""
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    count, heads, width = q_NHD.shape
    groups = key_NGD.shape[1]
    grouped = q_NHD.to(wide).reshape(count, groups, heads // groups, width)
    return (grouped * key_NGD.to(wide)[:, :, None]).sum(-1).reshape(count, heads) / math.sqrt(width)


@Fused
def weighted(x: Tensor, weight_NH: Tensor, heads: int | None = None) -> Tensor:
    """``[N, H, D]``, float32 or wider: vectors ``[N, G or H, D]``, each times the weight of the heads that it serves.

    Args:
        heads: ``H``. Default: the number of vectors.
    """
    count, groups, width = x.shape
    each = (heads or groups) // groups
    weight = weight_NH.reshape(count, groups, each, 1)
    return (x.to(weight.dtype)[:, :, None] * weight).reshape(count, groups * each, width)


@Fused
def of_group(x_NHD: Tensor, weight_NH: Tensor, groups: int) -> Tensor:
    """``[N, G, D]``, float32 or wider: weighted sums over the query heads of each key head."""
    count, heads, width = x_NHD.shape
    weight = weight_NH.reshape(count, groups, heads // groups, 1)
    return (x_NHD.to(weight.dtype).reshape(count, groups, heads // groups, width) * weight).sum(2)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of blocks that each row of a table chooses, and all block indices with the chosen ones
    first."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order[None, None].contiguous()


def _take(own_MGD: Tensor, index_N: Tensor | None) -> Tensor:
    return own_MGD if index_N is None else own_MGD[index_N]


def _give(own_MGD: Tensor, index_N: Tensor | None, gradient: Tensor) -> Tensor:
    """Return the gradient of `_take`'s argument from that of its result."""
    if index_N is None:
        return gradient
    return torch.zeros_like(own_MGD).index_copy_(0, index_N, gradient)

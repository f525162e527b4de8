"""Attention of live columns: which keys a column sees, and the implementation for the device.

A column attends to the keys of the first unrolled step of its sample up to its own position, and to its own keys
of later steps (EAGLE-3, arXiv:2503.01840, §3.2). `cpu` computes it on a CPU, `gpu` on a GPU.

Shapes: ``N`` live columns, ``R`` columns with first-step keys, ``M`` columns that were live in an earlier step,
``H`` query heads, ``G`` key heads, ``D`` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specbatch.drafts.attention.keys import OwnKeys, PrefixMask

__all__ = ["OwnKeys", "PrefixMask", "attend"]


def attend(q_NHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, own: Sequence[OwnKeys], prefix_mask: PrefixMask) -> Tensor:
    """``softmax(q [k; own keys]ᵀ / √D) [v; own values]``, softmax in float32 or wider.

    Args:
        own: keys and values of each later step, up to the current one.

    Returns:
        ``[N, H, D]`` in the queries' dtype.
    """
    from specbatch.drafts.attention import cpu, gpu

    # Without queries there is no kernel to run, but the keys still need a gradient, which is zero.
    if q_NHD.is_cuda and len(q_NHD):
        return gpu.attend(q_NHD, k_RGD, v_RGD, own, prefix_mask)
    return cpu.attend(q_NHD, k_RGD, v_RGD, own, prefix_mask)

"""Attention of live columns: what a column sees, and which implementation computes it where.

A column attends to the first unrolled step's keys of its sample up to its own position, and to its own keys
of later steps (EAGLE-3, arXiv:2503.01840, §3.2). On a CPU `blockwise` does it, on a GPU `flex`.

Shapes: ``N`` live columns, ``R`` columns with first-step keys, ``M`` columns that were live in an earlier step,
``H`` query heads, ``G`` key heads, ``D`` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sight:
    """What live columns see of the first step's keys: those of their sample up to themselves."""

    row_N: Tensor
    """int64, ascending: which of the ``R`` columns each query is."""
    samples: tuple[tuple[int, int], ...]
    """First and one past the last of the ``R`` columns of each sample."""

    @cached_property
    def starts(self) -> Tensor:
        """int64 ``[N]``: the first key that each query sees; the last is its own."""
        bounds = torch.tensor(self.samples, dtype=torch.int64).view(-1, 2)
        bounds = bounds.to(self.row_N.device, non_blocking=True)
        return bounds[torch.searchsorted(bounds[:, 1].contiguous(), self.row_N, right=True), 0]


@dataclass(frozen=True)
class Own:
    """Keys and values that the columns made in one later step."""

    key_MGD: Tensor
    value_MGD: Tensor
    index_N: Tensor | None
    """int64, ascending: which of them each query's column made; None: they are the queries' columns, in their order."""


def attend(q_NHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, own: Sequence[Own], sight: Sight) -> Tensor:
    """``softmax(q [k; own keys]ᵀ / √D) [v; own values]``, softmax in float32 or wider.

    Args:
        own: for each later step, its first to the present one.

    Returns:
        ``[N, H, D]`` in the queries' dtype.
    """
    from specbatch.training import blockwise, flex

    # Without queries there is no kernel to run, but the keys still have a gradient, of zero.
    if q_NHD.is_cuda and len(q_NHD):
        return flex.attend(q_NHD, k_RGD, v_RGD, own, sight)
    return blockwise.attend(q_NHD, k_RGD, v_RGD, own, sight)

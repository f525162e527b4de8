"""The keys that live queries of a draft's attention see: a prefix of the pack's keys, and a few of their own.

Shapes: as in `specbatch.drafts.attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixMask:
    """The first step's keys that live columns see: those of their sample up to themselves."""

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
class OwnKeys:
    """Keys and values that the columns made in one later step."""

    key_MGD: Tensor
    value_MGD: Tensor
    index_N: Tensor | None
    """int64, ascending: the row of each query's column; None if the rows are the queries' columns, in their order."""

"""The tensors of a pack that a draft reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from specbatch.drafts.masks import SampleId


@dataclass(frozen=True)
class ContextShard:
    """The position of this rank among those that train a pack together."""

    rank: int = 0
    ranks: int = 1


WHOLE = ContextShard()


@dataclass
class PackTensors:
    """The concatenated samples of a pack. A pack without samples has tensors without rows."""

    input_ids: Tensor
    """int64 ``[tokens]``."""
    loss_mask: Tensor
    """bool ``[tokens]``, on the host."""
    lengths: tuple[int, ...]
    """Tokens of each sample."""
    rows: dict[str, Tensor]
    """Each tensor of the contract, ``[rows, width]``: the contract's rows of each sample that belong to the share."""
    samples: tuple[SampleId, ...] = ()
    """Ids of the samples."""
    share: ContextShard = WHOLE


def runs(ascending: Tensor) -> list[tuple[int, int]]:
    """Return the first and one past the last of each run of consecutive numbers; one empty run if there are none."""
    if not len(ascending):
        return [(0, 0)]
    breaks = ((ascending.diff() > 1).nonzero().flatten() + 1).tolist()
    return [(int(ascending[a]), int(ascending[b - 1]) + 1) for a, b in pairwise([0, *breaks, len(ascending)])]

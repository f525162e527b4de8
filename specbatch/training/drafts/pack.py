"""A pack as the draft reads it, and which of its positions are worth computing.

Draft column ``i`` of unrolled step ``k`` reads token ``i + 1 + k`` and learns the target's distribution at
position ``i + 1 + k``. A column is live at step ``k`` while any step from ``k`` on has such a position to
learn from; all others need no more than the first step's key and value.

Several ranks can train a pack together (`Share`): each has the rows of its own columns, and of all others it needs
the first step's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

STEP_COST = 5
"""What an unrolled step of a live column costs, in first steps' keys and values with the projection before them: about
330 to 67 million multiplications for an 8B target's draft."""


@dataclass(frozen=True)
class Share:
    """Which of the ranks that train a pack together this one is."""

    rank: int = 0
    ranks: int = 1


WHOLE = Share()


@dataclass
class PackTensors:
    """The samples of a pack one after the other. A pack without samples has tensors without rows."""

    input_ids: Tensor
    """int64 ``[tokens]``."""
    loss_mask: Tensor
    """bool ``[tokens]``."""
    lengths: tuple[int, ...]
    """Tokens of each sample."""
    aux: Tensor
    """``[columns, 3 * hidden]``, the capture contract's rows of each sample; of them, those of the share."""
    last: Tensor
    """``[targets, hidden]``, the capture contract's rows of each sample; of them, those of the share."""
    share: Share = WHOLE


@dataclass(frozen=True)
class Layout:
    """Where the columns of a whole pack stand: ``R``, as many as rows of ``aux``. Tensors are int64, on the host."""

    samples: tuple[tuple[int, int], ...]
    """First and one past the last row of each sample that has any."""
    position_R: Tensor
    """Position in the sample."""
    token_R: Tensor
    """Index into ``input_ids`` of the token at that position."""
    target_KR: Tensor
    """Row of ``last`` that each unrolled step learns from, -1 where there is none."""
    targets: int
    """Rows of ``last``."""

    def live_steps(self) -> Tensor:
        """int64 ``[R]``: of how many unrolled steps, from the first, each column is live."""
        steps = torch.arange(1, len(self.target_KR) + 1)[:, None]
        return torch.where(self.target_KR >= 0, steps, 0).amax(0)

    def divide(self, ranks: int) -> list[Tensor]:
        """The columns of each rank, ascending: of even cost, which is that of live columns above all.

        The row of columns is cut into twice as many pieces as there are ranks, all of the same cost; a rank has the
        piece as far from the beginning as its other one is from the end, since later columns see more keys.
        """
        columns = torch.arange(len(self.position_R))
        if ranks == 1:
            return [columns]
        cost = torch.cumsum(1 + STEP_COST * self.live_steps(), 0)
        total = int(cost[-1]) if len(cost) else 0
        cuts = torch.searchsorted(cost, torch.tensor([total * n // (2 * ranks) for n in range(1, 2 * ranks)]))
        pieces = columns.tensor_split(cuts)
        return [torch.cat([pieces[rank], pieces[-1 - rank]]) for rank in range(ranks)]

    def rows(self, columns: Tensor) -> dict[str, Tensor]:
        """The rows of each tensor that these columns need, ascending."""
        target = self.target_KR[:, columns]
        return {"aux": columns, "last": target[target >= 0].unique()}


@dataclass(frozen=True)
class Columns:
    """The columns of a pack that a rank computes: ``C`` of the ``R`` of all ranks. Tensors are int64, on the host."""

    samples: tuple[tuple[int, int], ...]
    """First and one past the last of the ``R`` rows of each sample that has any."""
    row_C: Tensor
    """Ascending: which of the ``R`` rows each column is."""
    position_C: Tensor
    """Position in the sample."""
    token_C: Tensor
    """Index into ``input_ids`` of the token at that position."""
    target_KC: Tensor
    """Row of the pack's ``last`` that each unrolled step learns from, -1 where there is none."""
    of_ranks: tuple[Tensor, ...]
    """For each rank, which of the ``R`` rows its columns are."""


def supervised_counts(loss_mask: np.ndarray, ttt_steps: int) -> np.ndarray:
    """How many columns enter the loss of each unrolled step.

    Args:
        loss_mask: bool ``[tokens]`` of one sample.

    Returns:
        int64 ``[ttt_steps]``.
    """
    import numpy as np

    target = np.flatnonzero(loss_mask[2:]) + 1
    return np.array([np.count_nonzero(target > step) for step in range(ttt_steps)], dtype=np.int64)


def lay_out(loss_mask: Tensor, lengths: tuple[int, ...], ttt_steps: int) -> Layout:
    """Find the columns of a pack and what they learn from: the rows that the capture contract names.

    Args:
        loss_mask: bool ``[tokens]``, of all samples, on the host.
    """
    samples: list[tuple[int, int]] = []
    positions, tokens, targets = [], [], []
    first_token = first_column = first_target = 0
    for length in lengths:
        target = loss_mask[first_token + 2 : first_token + length].nonzero().flatten() + 1
        count = int(target[-1]) if len(target) else 0
        row_of = torch.full((length + ttt_steps,), -1)
        row_of[target] = first_target + torch.arange(len(target))
        column = torch.arange(count)
        if count:
            samples.append((first_column, first_column + count))
        positions.append(column)
        tokens.append(first_token + column)
        targets.append(row_of[1 + column + torch.arange(ttt_steps)[:, None]])
        first_token += length
        first_column += count
        first_target += len(target)
    none = torch.empty(0, dtype=torch.int64)
    return Layout(
        samples=tuple(samples),
        position_R=torch.cat([none, *positions]),
        token_R=torch.cat([none, *tokens]),
        target_KR=torch.cat([none.expand(ttt_steps, 0), *targets], 1),
        targets=first_target,
    )


def part_of(loss_mask: Tensor, lengths: tuple[int, ...], share: Share, ttt_steps: int) -> dict[str, Tensor]:
    """int64, the rows of each tensor that a share of a pack needs, ascending."""
    layout = lay_out(loss_mask, lengths, ttt_steps)
    return layout.rows(layout.divide(share.ranks)[share.rank])


def runs(ascending: Tensor) -> list[tuple[int, int]]:
    """First and one past the last of each run of neighbouring numbers; one empty run if there are none."""
    if not len(ascending):
        return [(0, 0)]
    breaks = ((ascending.diff() > 1).nonzero().flatten() + 1).tolist()
    return [(int(ascending[a]), int(ascending[b - 1]) + 1) for a, b in pairwise([0, *breaks, len(ascending)])]


def locate(pack: PackTensors, ttt_steps: int) -> Columns:
    """Find the columns of a pack that its share has.

    Raises:
        ValueError: if the tensors do not have the rows that the capture contract names.
    """
    layout = lay_out(pack.loss_mask.cpu(), pack.lengths, ttt_steps)
    of_ranks = layout.divide(pack.share.ranks)
    rows = layout.rows(of_ranks[pack.share.rank])
    columns, last = rows["aux"], rows["last"] if pack.share.ranks > 1 else torch.arange(layout.targets)
    if pack.aux.shape[0] != len(columns) or pack.last.shape[0] != len(last):
        raise ValueError(
            f"the pack has {pack.aux.shape[0]} rows of aux and {pack.last.shape[0]} of last, "
            f"its masks ask for {len(columns)} and {len(last)}"
        )
    target = layout.target_KR[:, columns]
    return Columns(
        samples=layout.samples,
        row_C=columns,
        position_C=layout.position_R[columns],
        token_C=layout.token_R[columns],
        target_KC=torch.where(target >= 0, torch.searchsorted(last, target), -1),
        of_ranks=tuple(of_ranks),
    )

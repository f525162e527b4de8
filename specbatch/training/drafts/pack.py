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

import numpy as np
from torch import Tensor

from specbatch.capture import CaptureContract

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
    """Where the columns of a whole pack stand. ``R`` is the number of rows of ``aux``."""

    samples: tuple[tuple[int, int], ...]
    """First and one past the last row of each sample that has any."""
    position_R: np.ndarray
    """int64: position in the sample."""
    token_R: np.ndarray
    """int64: index into ``input_ids`` of the token at that position."""
    target_KR: np.ndarray
    """int64: row of ``last`` that each unrolled step learns from, -1 where there is none."""
    targets: int
    """Rows of ``last``."""

    def live_steps(self) -> np.ndarray:
        """int64 ``[R]``: of how many unrolled steps, from the first, each column is live."""
        steps = np.arange(1, len(self.target_KR) + 1)[:, None]
        return np.where(self.target_KR >= 0, steps, 0).max(axis=0, initial=0)

    def divide(self, ranks: int) -> list[np.ndarray]:
        """The columns of each rank, ascending: of even cost, which is that of live columns above all.

        The row of columns is cut into twice as many pieces as there are ranks, all of the same cost; a rank has the
        piece as far from the beginning as its other one is from the end, since later columns see more keys.
        """
        cost = np.concatenate([[0], np.cumsum(1 + STEP_COST * self.live_steps())])
        cuts = np.searchsorted(cost, cost[-1] * np.arange(2 * ranks + 1) / (2 * ranks))
        cuts[-1] = len(self.position_R)
        pieces = [np.arange(first, end) for first, end in pairwise(cuts)]
        if ranks == 1:
            return [np.concatenate(pieces)]
        return [np.concatenate([pieces[rank], pieces[-1 - rank]]) for rank in range(ranks)]

    def rows(self, columns: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of each tensor that these columns need, ascending."""
        target = self.target_KR[:, columns]
        return {"aux": columns, "last": np.unique(target[target >= 0])}


@dataclass(frozen=True)
class Columns:
    """The columns of a pack that a rank computes. ``C`` is their number, ``R`` that of all ranks. Arrays are int64."""

    samples: tuple[tuple[int, int], ...]
    """First and one past the last of the ``R`` rows of each sample that has any."""
    row_C: np.ndarray
    """Ascending: which of the ``R`` rows each column is."""
    position_C: np.ndarray
    """Position in the sample."""
    token_C: np.ndarray
    """Index into ``input_ids`` of the token at that position."""
    target_KC: np.ndarray
    """Row of the pack's ``last`` that each unrolled step learns from, -1 where there is none."""
    of_ranks: tuple[np.ndarray, ...]
    """For each rank, which of the ``R`` rows its columns are."""


def supervised_counts(loss_mask: np.ndarray, ttt_steps: int) -> np.ndarray:
    """How many columns enter the loss of each unrolled step.

    Args:
        loss_mask: bool ``[tokens]`` of one sample.

    Returns:
        int64 ``[ttt_steps]``.
    """
    target = np.flatnonzero(loss_mask[2:]) + 1
    return np.array([np.count_nonzero(target > step) for step in range(ttt_steps)], dtype=np.int64)


def lay_out(loss_mask: np.ndarray, lengths: tuple[int, ...], contract: CaptureContract, ttt_steps: int) -> Layout:
    """Find the columns of a pack and what they learn from.

    Args:
        loss_mask: bool ``[tokens]``, of all samples.
    """
    samples, positions, tokens, targets = [], [], [], []
    first_token = first_column = first_target = 0
    for length in lengths:
        rows = contract.rows(loss_mask[first_token : first_token + length])
        columns = rows["aux"]
        row_of = np.full(length + ttt_steps, -1, dtype=np.int64)
        row_of[rows["last"]] = first_target + np.arange(rows["last"].size)
        targets.append(np.stack([row_of[columns + 1 + step] for step in range(ttt_steps)]))
        if columns.size:
            samples.append((first_column, first_column + columns.size))
            positions.append(columns)
            tokens.append(first_token + columns)
        first_token += length
        first_column += columns.size
        first_target += rows["last"].size

    def joined(parts: list[np.ndarray], empty: tuple[int, ...]) -> np.ndarray:
        return np.concatenate([np.empty(empty, dtype=np.int64), *parts], axis=-1)

    return Layout(
        samples=tuple(samples),
        position_R=joined(positions, (0,)),
        token_R=joined(tokens, (0,)),
        target_KR=joined(targets, (ttt_steps, 0)),
        targets=first_target,
    )


def part_of(
    loss_mask: np.ndarray, lengths: tuple[int, ...], share: Share, contract: CaptureContract, ttt_steps: int
) -> dict[str, np.ndarray]:
    """The rows of each tensor that a share of a pack needs, ascending."""
    layout = lay_out(loss_mask, lengths, contract, ttt_steps)
    return layout.rows(layout.divide(share.ranks)[share.rank])


def runs(ascending: np.ndarray) -> list[tuple[int, int]]:
    """First and one past the last of each run of neighbouring numbers; one empty run if there are none."""
    ends = [0, *(np.flatnonzero(np.diff(ascending) > 1) + 1), len(ascending)]
    if not len(ascending):
        return [(0, 0)]
    return [(int(ascending[first]), int(ascending[end - 1]) + 1) for first, end in pairwise(ends)]


def locate(pack: PackTensors, contract: CaptureContract, ttt_steps: int) -> Columns:
    """Find the columns of a pack that its share has.

    Raises:
        ValueError: if the tensors do not have the rows that the contract names.
    """
    layout = lay_out(pack.loss_mask.cpu().numpy(), pack.lengths, contract, ttt_steps)
    of_ranks = layout.divide(pack.share.ranks)
    rows = layout.rows(of_ranks[pack.share.rank]) if pack.share.ranks > 1 else None
    columns = np.arange(len(layout.position_R)) if rows is None else rows["aux"]
    last = layout.targets if rows is None else len(rows["last"])
    if pack.aux.shape[0] != len(columns) or pack.last.shape[0] != last:
        raise ValueError(
            f"the pack has {pack.aux.shape[0]} rows of aux and {pack.last.shape[0]} of last, "
            f"its masks ask for {len(columns)} and {last}"
        )
    target = layout.target_KR[:, columns]
    if rows is not None:
        target = np.where(target >= 0, np.searchsorted(rows["last"], target), -1)

    return Columns(
        samples=layout.samples,
        row_C=columns,
        position_C=layout.position_R[columns],
        token_C=layout.token_R[columns],
        target_KC=target,
        of_ranks=tuple(of_ranks),
    )

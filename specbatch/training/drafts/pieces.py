"""The live columns of a pack, some at a time, and what each unrolled step does with them.

All of it is known from the masks and worked out on the host, so that nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from specbatch.training.drafts.pack import Columns
from specbatch.training.loss import Landing


@dataclass(frozen=True)
class StepRows:
    """The ``N`` columns of a piece that an unrolled step computes. All arrays are int64."""

    live_N: np.ndarray
    """Which of the piece's columns they are, ascending."""
    kept_N: np.ndarray | None
    """Which of the step before's they are; None: all of them."""
    row_N: np.ndarray
    """Which of the piece's keys is each column's own."""
    position_N: np.ndarray
    """Position in the sample."""
    token_N: np.ndarray
    """Index into the pack's ``input_ids`` of the token at that position."""
    learns_M: np.ndarray
    """Which of them learn, ascending."""
    target_M: np.ndarray
    """And from which row of the pack's ``last``, ascending."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring live columns, and the first step's keys that they see."""

    columns: np.ndarray
    """int64: which of the share's columns they are, ascending."""
    keys: slice
    """Of the pack's columns."""
    samples: tuple[tuple[int, int], ...]
    """First and one past the last of these keys of each sample."""
    steps: tuple[StepRows, ...]

    @property
    def landings(self) -> list[Landing]:
        """Which columns learn in each step, and from where."""
        return [Landing(rows.learns_M, rows.target_M) for rows in self.steps]


def cut(columns: Columns, size: int) -> Iterator[Piece]:
    """Cut the live columns into pieces.

    Args:
        size: most columns of a piece.
    """
    live = np.flatnonzero((columns.target_KC >= 0).any(0))
    for first in range(0, len(live), size):
        yield _piece(columns, live[first : first + size])


def _piece(columns: Columns, chosen: np.ndarray) -> Piece:
    row = columns.row_C[chosen]
    seen = [sample for sample in columns.samples if sample[0] <= row[-1] and sample[1] > row[0]]
    keys = slice(seen[0][0], int(row[-1]) + 1)
    samples = tuple((first - keys.start, min(end, keys.stop) - keys.start) for first, end in seen)
    target_KN = columns.target_KC[:, chosen]
    steps: list[StepRows] = []
    for step in range(len(target_KN)):
        live = np.flatnonzero((target_KN[step:] >= 0).any(0))
        before = steps[-1].live_N if steps else live
        target = target_KN[step, live]
        learns = np.flatnonzero(target >= 0)
        steps.append(
            StepRows(
                live_N=live,
                kept_N=None if len(live) == len(before) else np.searchsorted(before, live),
                row_N=row[live] - keys.start,
                position_N=columns.position_C[chosen[live]],
                token_N=columns.token_C[chosen[live]],
                learns_M=learns,
                target_M=target[learns],
            )
        )
    return Piece(chosen, keys, samples, tuple(steps))

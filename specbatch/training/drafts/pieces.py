"""The live columns of a pack, some at a time, and what each unrolled step does with them.

All of it is known from the masks and worked out on the host, so that nothing waits for a device; and it goes there by
copies that are not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specbatch.training.drafts.pack import Columns
from specbatch.training.loss import Landing


@dataclass(frozen=True)
class StepRows:
    """The ``N`` columns of a piece that an unrolled step computes. All tensors are int64, on the host."""

    live_N: Tensor
    """Which of the piece's columns they are, ascending."""
    kept_N: Tensor | None
    """Which of the step before's they are; None: all of them."""
    row_N: Tensor
    """Which of the piece's keys is each column's own."""
    position_N: Tensor
    """Position in the sample."""
    token_N: Tensor
    """Index into the pack's ``input_ids`` of the token at that position."""
    learns_M: Tensor
    """Which of them learn, ascending."""
    target_M: Tensor
    """And from which row of the pack's ``last``, ascending."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring live columns, and the first step's keys that they see."""

    columns: Tensor
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
    """Cut the live columns into pieces of the same size: a small one would need the whole layer, too, and on a GPU
    compilations of its own.

    Args:
        size: most columns of a piece.
    """
    live = (columns.target_KC >= 0).any(0).nonzero().flatten()
    if len(live):
        for chosen in live.tensor_split(-(-len(live) // size)):
            yield _piece(columns, chosen)


def _piece(columns: Columns, chosen: Tensor) -> Piece:
    row = columns.row_C[chosen]
    first_row, last_row = int(row[0]), int(row[-1])
    seen = [sample for sample in columns.samples if sample[0] <= last_row and sample[1] > first_row]
    keys = slice(seen[0][0], last_row + 1)
    samples = tuple((first - keys.start, min(end, keys.stop) - keys.start) for first, end in seen)
    target_KN = columns.target_KC[:, chosen]
    steps: list[StepRows] = []
    for step in range(len(target_KN)):
        live = (target_KN[step:] >= 0).any(0).nonzero().flatten()
        before = steps[-1].live_N if steps else live
        target = target_KN[step, live]
        learns = (target >= 0).nonzero().flatten()
        steps.append(
            StepRows(
                live_N=live,
                kept_N=None if len(live) == len(before) else torch.searchsorted(before, live),
                row_N=row[live] - keys.start,
                position_N=columns.position_C[chosen[live]],
                token_N=columns.token_C[chosen[live]],
                learns_M=learns,
                target_M=target[learns],
            )
        )
    return Piece(chosen, keys, samples, tuple(steps))

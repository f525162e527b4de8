"""The live columns of a pack, in chunks, and what each unrolled step computes of them.

All of it follows from the masks and is computed on the host, so nothing waits for a device; copies to the device are
asynchronous.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specbatch.drafts.eagle3.columns import Columns
from specbatch.drafts.loss import LossRows


@dataclass(frozen=True)
class StepRows:
    """The ``N`` columns of a chunk that an unrolled step computes. All tensors are int64, on the host."""

    live_N: Tensor
    """Their indices among the chunk's columns, ascending."""
    kept_N: Tensor | None
    """Their indices among the previous step's columns; None if they are all of them."""
    row_N: Tensor
    """Index among the chunk's keys of each column's own key."""
    position_N: Tensor
    """Position in the sample."""
    token_N: Tensor
    """Index into the pack's ``input_ids`` of the token at that position."""
    read_N: Tensor
    """Index among the chunk's tokens of the token that the column reads."""
    learns_M: Tensor
    """Indices of the columns that learn, ascending."""
    target_M: Tensor
    """Row of the pack's ``last`` that each of them learns from, ascending."""


@dataclass(frozen=True)
class ColumnChunk:
    """Consecutive live columns, and the first step's keys that they see."""

    columns: Tensor
    """int64: their indices among the share's columns, ascending."""
    keys: slice
    """The pack's columns whose keys they see."""
    samples: tuple[tuple[int, int], ...]
    """First and one past the last of these keys, for each sample."""
    tokens: Tensor
    """int64: indices into the pack's ``input_ids`` of the tokens that the columns read in any step, ascending, on the
    host."""
    steps: tuple[StepRows, ...]

    @property
    def loss_rows(self) -> list[LossRows]:
        """For each step, the columns that learn, and the rows that they learn from."""
        return [LossRows(rows.learns_M, rows.target_M) for rows in self.steps]


def column_chunks(columns: Columns, size: int) -> Iterator[ColumnChunk]:
    """Cut the live columns into chunks of the same size, since a smaller one would still cost a pass over the layer's
    weights, and on a GPU another compilation.

    Args:
        size: most columns of a chunk.
    """
    live = (columns.target_KC >= 0).any(0).nonzero().flatten()
    if len(live):
        for chosen in live.tensor_split(-(-len(live) // size)):
            yield _chunk(columns, chosen)


def _chunk(columns: Columns, chosen: Tensor) -> ColumnChunk:
    row = columns.row_C[chosen]
    first_row, last_row = int(row[0]), int(row[-1])
    seen = [sample for sample in columns.samples if sample[0] <= last_row and sample[1] > first_row]
    keys = slice(seen[0][0], last_row + 1)
    samples = tuple((first - keys.start, min(end, keys.stop) - keys.start) for first, end in seen)
    target_KN = columns.target_KC[:, chosen]
    lives = [(target_KN[step:] >= 0).any(0).nonzero().flatten() for step in range(len(target_KN))]
    reads = [columns.token_C[chosen[live]] + 1 + step for step, live in enumerate(lives)]
    tokens = torch.cat(reads).unique()
    steps: list[StepRows] = []
    for step, live in enumerate(lives):
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
                read_N=torch.searchsorted(tokens, reads[step]),
                learns_M=learns,
                target_M=target[learns],
            )
        )
    return ColumnChunk(chosen, keys, samples, tokens, tuple(steps))

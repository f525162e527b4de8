"""The layout of a pack for the draft: the positions that have to be computed, and what they learn from.

Draft column ``i`` of unrolled step ``k`` reads token ``i + 1 + k`` and learns the target's distribution at position
``i + 1 + k``, if all tokens from the first one that it reads to the one that it proposes are loss tokens: while
decoding, drafting begins at a token that the target chose. A column is live at step ``k`` while it learns; all others
need only the first step's key and value.

Several ranks can train a pack together (`ContextShard`): each has the rows of its own columns, and receives the first
step's keys and values of all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specbatch.drafts.eagle3.contract import target_positions
from specbatch.drafts.pack import PackTensors

STEP_COST = 5
"""Cost of an unrolled step of a live column, in units of the first step's projection, key and value: about 330 to 67
million multiplications for the draft of an 8B target."""


@dataclass(frozen=True)
class ColumnLayout:
    """The ``R`` columns of a whole pack, one for each row of ``aux``. Tensors are int64, on the host."""

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
        """Return the number of unrolled steps, from the first, in which each column is live: int64 ``[R]``."""
        steps = torch.arange(1, len(self.target_KR) + 1)[:, None]
        return torch.where(self.target_KR >= 0, steps, 0).amax(0)

    def divide(self, ranks: int) -> list[Tensor]:
        """Return the columns of each rank, ascending, such that all ranks have the same cost, mostly that of live
        columns.

        The sequence of columns is cut into twice as many pieces as ranks, all of the same cost. Each rank has one piece
        from the first half and the mirrored one from the second, since later columns see more keys.
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
        """Return the rows of each tensor that these columns need, ascending."""
        target = self.target_KR[:, columns]
        return {"aux": columns, "last": target[target >= 0].unique()}


@dataclass(frozen=True)
class Columns:
    """The ``C`` columns of a pack that a rank computes, of the ``R`` of all ranks. Tensors are int64, on the host."""

    samples: tuple[tuple[int, int], ...]
    """First and one past the last of the ``R`` rows of each sample that has any."""
    row_C: Tensor
    """Ascending: the row of each column among the ``R``."""
    position_C: Tensor
    """Position in the sample."""
    token_C: Tensor
    """Index into ``input_ids`` of the token at that position."""
    target_KC: Tensor
    """Row of the pack's ``last`` that each unrolled step learns from, -1 where there is none."""
    of_ranks: tuple[Tensor, ...]
    """For each rank, the rows of its columns among the ``R``."""


def lay_out(loss_mask: Tensor, lengths: tuple[int, ...], ttt_steps: int) -> ColumnLayout:
    """Find the columns of a pack, and the rows that they learn from, as the capture contract defines them.

    Args:
        loss_mask: bool ``[tokens]``, of all samples, on the host.
    """
    samples: list[tuple[int, int]] = []
    positions, tokens, targets = [], [], []
    first_token = first_column = first_target = 0
    mask = loss_mask.numpy()
    for length in lengths:
        target = torch.from_numpy(target_positions(mask[first_token : first_token + length]))
        count = int(target[-1]) if len(target) else 0
        row_of = torch.full((length + ttt_steps,), -1)
        row_of[target] = first_target + torch.arange(len(target))
        column = torch.arange(count)
        chosen = torch.zeros(length + ttt_steps + 1, dtype=torch.bool)
        chosen[:length] = loss_mask[first_token : first_token + length]
        unbroken = chosen[1 + column + torch.arange(ttt_steps + 1)[:, None]].cumprod(0).bool()
        if count:
            samples.append((first_column, first_column + count))
        positions.append(column)
        tokens.append(first_token + column)
        targets.append(torch.where(unbroken[1:], row_of[1 + column + torch.arange(ttt_steps)[:, None]], -1))
        first_token += length
        first_column += count
        first_target += len(target)
    none = torch.empty(0, dtype=torch.int64)
    return ColumnLayout(
        samples=tuple(samples),
        position_R=torch.cat([none, *positions]),
        token_R=torch.cat([none, *tokens]),
        target_KR=torch.cat([none.expand(ttt_steps, 0), *targets], 1),
        targets=first_target,
    )


def locate(pack: PackTensors, ttt_steps: int) -> Columns:
    """Find the columns that belong to this rank's share of a pack.

    Raises:
        ValueError: the tensors do not have the rows that the capture contract names.
    """
    layout = lay_out(pack.loss_mask.cpu(), pack.lengths, ttt_steps)
    of_ranks = layout.divide(pack.share.ranks)
    rows = layout.rows(of_ranks[pack.share.rank])
    columns, last = rows["aux"], rows["last"] if pack.share.ranks > 1 else torch.arange(layout.targets)
    if pack.rows["aux"].shape[0] != len(columns) or pack.rows["last"].shape[0] != len(last):
        raise ValueError(
            f"the pack has {pack.rows['aux'].shape[0]} rows of aux and {pack.rows['last'].shape[0]} of last, "
            f"its masks ask for {len(columns)} and {len(last)}"
        )
    if "embeds" in pack.rows and len(pack.rows["embeds"]) != len(columns):
        raise ValueError(f"the pack has {len(pack.rows['embeds'])} rows of embeds, its masks ask for {len(columns)}")
    target = layout.target_KR[:, columns]
    return Columns(
        samples=layout.samples,
        row_C=columns,
        position_C=layout.position_R[columns],
        token_C=layout.token_R[columns],
        target_KC=torch.where(target >= 0, torch.searchsorted(last, target), -1),
        of_ranks=tuple(of_ranks),
    )

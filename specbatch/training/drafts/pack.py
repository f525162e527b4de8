"""A pack as the draft reads it, and which of its positions are worth computing.

Draft column ``i`` of unrolled step ``k`` reads token ``i + 1 + k`` and learns the target's distribution at
position ``i + 1 + k``. A column is live at step ``k`` while any step from ``k`` on has such a position to
learn from; all others need no more than the first step's key and value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specbatch.capture import CaptureContract


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
    """``[columns, 3 * hidden]``, the capture contract's rows of each sample."""
    last: Tensor
    """``[targets, hidden]``, the capture contract's rows of each sample."""


@dataclass(frozen=True)
class Columns:
    """Where the rows of a pack stand. ``R`` is the number of rows of ``aux``."""

    samples: tuple[tuple[int, int], ...]
    """First and one past the last row of each sample that has any."""
    position_R: Tensor
    """int64: position in the sample."""
    token_R: Tensor
    """int64: index into ``input_ids`` of the token at that position."""
    target_KR: Tensor
    """int64: row of ``last`` that each unrolled step learns from, -1 where there is none."""

    def live(self, step: int) -> Tensor:
        """int64: rows that this unrolled step computes, ascending."""
        return (self.target_KR[step:] >= 0).any(0).nonzero().flatten()


def supervised_counts(loss_mask: np.ndarray, ttt_steps: int) -> np.ndarray:
    """How many columns enter the loss of each unrolled step.

    Args:
        loss_mask: bool ``[tokens]`` of one sample.

    Returns:
        int64 ``[ttt_steps]``.
    """
    target = np.flatnonzero(loss_mask[2:]) + 1
    return np.array([np.count_nonzero(target > step) for step in range(ttt_steps)], dtype=np.int64)


def locate(pack: PackTensors, contract: CaptureContract, ttt_steps: int) -> Columns:
    """Find the columns of a pack and what they learn from.

    Raises:
        ValueError: if the tensors do not have the rows that the contract names.
    """
    mask = pack.loss_mask.cpu().numpy()
    device = pack.input_ids.device
    samples, positions, tokens, targets = [], [], [], []
    first_token = first_column = first_target = 0
    for length in pack.lengths:
        rows = contract.rows(mask[first_token : first_token + length])
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
    if pack.aux.shape[0] != first_column or pack.last.shape[0] != first_target:
        raise ValueError(
            f"the pack has {pack.aux.shape[0]} rows of aux and {pack.last.shape[0]} of last, "
            f"its masks ask for {first_column} and {first_target}"
        )

    def tensor(parts: list[np.ndarray], empty: tuple[int, ...]) -> Tensor:
        joined = np.concatenate(parts, axis=-1) if parts else np.empty(empty, dtype=np.int64)
        return torch.from_numpy(joined).to(device)

    return Columns(
        samples=tuple(samples),
        position_R=tensor(positions, (0,)),
        token_R=tensor(tokens, (0,)),
        target_KR=tensor(targets, (ttt_steps, 0)),
    )

"""Gathers the first step's keys and values over the ranks that train a pack together: all that they have to exchange.

Later keys are seen only by their own column, and so stay on the rank that computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def gather_rows(own: Tensor, rows_of_ranks: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Gather the columns of all ranks. Differentiable: the gradient of a column is the sum over ranks.

    Args:
        own: rows of this rank's columns, ``[C, ...]``.
        rows_of_ranks: for each rank of the group, the rows of its columns among the ``R``: int64.

    Returns:
        ``[R, ...]``, the same on all ranks.
    """
    from torch.distributed._functional_collectives import all_gather_single_autograd

    most = max(len(rows) for rows in rows_of_ranks)
    padded = F.pad(own, (0, 0) * (own.ndim - 1) + (0, most - len(own)))
    gathered = all_gather_single_autograd(padded.contiguous(), 0, group)
    where = torch.empty(sum(map(len, rows_of_ranks)), dtype=torch.int64)
    for rank, rows in enumerate(rows_of_ranks):
        where[rows] = rank * most + torch.arange(len(rows))
    return gathered[where.to(own.device, non_blocking=True)]

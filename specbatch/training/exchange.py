"""The first step's keys and values of ranks that train a pack together: the only thing that crosses them.

Every later key is its own column's, and so stays with the rank that computes the column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def of_all_ranks(own: Tensor, rows_of_ranks: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Bring the columns of all ranks together; differentiable, the gradient of a column is the sum over ranks.

    Args:
        own: ``[C, ...]``, of this rank's columns.
        rows_of_ranks: int64, for each rank of the group, which of the ``R`` rows its columns are.

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

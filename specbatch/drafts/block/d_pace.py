"""D-PACE (arXiv:2605.18810): weights each slot by the probability that the draft reaches it.

Shapes: as in `specbatch.drafts.block.loss`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specbatch.drafts import memory
from specbatch.drafts.block.heads import BlockHeads, Learnt, inputs_of, logits_of
from specbatch.drafts.loss import wider

PACE_FLOOR = 0.5
"""α of D-PACE: the factor on slots after one that is always wrong."""


def pace(state_MH: Tensor, learnt: Learnt, heads: BlockHeads) -> Tensor:
    """Return D-PACE's weights ``[M]``: ``Σ_{u >= k} Π_{v <= u} s_v`` with ``s = (1 - α) q(t) + α`` over the slots of a
    block."""
    order = _order(learnt)
    blocks = int(learnt.block_M[-1]) + 1 if len(learnt.block_M) else 0
    reached = state_MH.new_zeros(blocks, len(learnt.targets), dtype=wider(state_MH.dtype))
    for part in _slots_at_a_time(learnt, heads, state_MH):
        logits = logits_of(*inputs_of(state_MH, learnt, heads, part), heads)
        right = (logits.gather(1, learnt.label_M[part, None])[:, 0] - logits.logsumexp(-1)).exp()
        reached[learnt.block_M[part], order[part]] = (1 - PACE_FLOOR) * right + PACE_FLOOR
    # Slots that do not learn come after those that do, and add nothing.
    reached = reached.cumprod(-1)
    return reached.flip(-1).cumsum(-1).flip(-1)[learnt.block_M, order]


def _order(learnt: Learnt) -> Tensor:
    """Return the index of the proposed token that each slot learns, int64 ``[M]``."""
    order = torch.empty_like(learnt.block_M)
    for k, rows in enumerate(learnt.targets):
        order[rows.row_M.to(order.device, non_blocking=True)] = k
    return order


def _slots_at_a_time(learnt: Learnt, heads: BlockHeads, state_MH: Tensor) -> Sequence[Tensor]:
    each = 3 * wider(state_MH.dtype).itemsize * len(heads.target_VH)
    size = memory.chunk_positions(each, gpu=state_MH.device.type != "cpu")
    return torch.arange(len(learnt.block_M), device=state_MH.device).split(size)

"""Base of the modules of several algorithms: attached tensors, shared keys, and recomputation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from specbatch.drafts.gather_keys import gather_rows
from specbatch.drafts.loss import wider
from specbatch.drafts.memory import Recomputation
from specbatch.drafts.pack import ContextShard
from specbatch.drafts.rope import Rope


class DraftModule(nn.Module):
    """A draft of decoder layers over the target's ``aux`` states (`specbatch.drafts.base.Module`).

    Args:
        recompute: what the backward pass recomputes instead of keeping it from the forward pass.
    """

    calibrated = ("aux",)

    def __init__(self, rope: Rope, recompute: Recomputation) -> None:
        super().__init__()
        self.rope, self.recompute = rope, recompute
        self.group: ProcessGroup | None = None
        """The ranks that train a pack together; None if packs are not shared."""
        self.embedding: Tensor | None = None
        self.target_head: Tensor | None = None
        self.target_bias: Tensor | None = None

    def _of_all_ranks(
        self, own: Sequence[Tensor], share: ContextShard, rows_of_ranks: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the keys and values ``[R, G, D]`` of the rows of all ranks that train a pack together.

        Args:
            own: keys and values of this rank's rows.
            rows_of_ranks: as for `gather_rows`.

        Raises:
            ValueError: the pack is a share, and the group is not set.
        """
        if share.ranks == 1 or not sum(map(len, rows_of_ranks)):
            return tuple(own)
        if self.group is None:
            raise ValueError("a share of a pack needs the group of ranks that train it")
        return gather_rows(torch.stack(list(own), 1), rows_of_ranks, self.group).unbind(1)

    def _rotation(self, position: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine at these positions, on the device of ``like``, in float32 or wider."""
        return self.rope.rotation(position.to(like.device, non_blocking=True), wider(like.dtype))

    def _saving(self, mode: Recomputation, part: Callable[..., Any], *args: Any) -> Any:
        """Run a part. If `recompute` is ``mode``, keep only its inputs for the backward pass, and run it again
        there."""
        if self.recompute != mode or not torch.is_grad_enabled():
            return part(*args)
        return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)

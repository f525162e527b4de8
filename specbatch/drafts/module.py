"""Base of the modules of several algorithms: first weights, attached tensors, shared keys, and recomputation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from specbatch.drafts.first_weights import fill, random_matrix
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

    @torch.no_grad()
    def initialize(
        self,
        seed: int,
        embedding: Tensor,
        target_head: Tensor,
        start: Mapping[str, Tensor] | None = None,
        target_bias: Tensor | None = None,
    ) -> None:
        """Implement `specbatch.drafts.base.Module.initialize`. Without a `_first_value`, matrices are uniform in
        ``±1 / √inputs`` and vectors are one."""
        self.attach(embedding, target_head, target_bias)
        for name, parameter in self.named_parameters():
            if start is not None and name in start:
                full = start[name]
            elif (first := self._first_value(name, parameter.shape, embedding)) is not None:
                full = first
            elif parameter.ndim == 1:
                full = torch.ones(parameter.shape)
            else:
                full = random_matrix(seed, name, parameter.shape)
            fill(parameter, full)

    def attach(self, embedding: Tensor, target_head: Tensor, target_bias: Tensor | None = None) -> None:
        """Use these tensors of the target, both ``[vocabulary, hidden]``, and the bias of its head if it has one."""
        device = self.fc.weight.device
        self.embedding, self.target_head = embedding.to(device), target_head.to(device)
        self.target_bias = None if target_bias is None else target_bias.to(device)

    def _first_value(self, name: str, shape: torch.Size, embedding: Tensor) -> Tensor | None:
        """Return the first value of a parameter, whole, if it has one of its own. The target's tensors are attached.

        Args:
            embedding: ``[vocabulary, hidden]`` of the target.
        """
        return None

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

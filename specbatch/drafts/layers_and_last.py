"""The tensors that several algorithms read: outputs of some layers, and the states after the final norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from specbatch.drafts.base import CaptureContract, TensorSpec


@dataclass(frozen=True)
class LayersAndLast(CaptureContract):
    """The concatenated outputs of some layers (``aux``), and the states after the final norm (``last``)."""

    aux_layers: tuple[int, ...]
    """Indices of the target's decoder layers, ascending, from 0."""
    hidden: int
    """Width of the target's hidden states."""

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        return {
            "aux": TensorSpec(self.aux_layers, len(self.aux_layers) * self.hidden),
            "last": TensorSpec(None, self.hidden),
        }

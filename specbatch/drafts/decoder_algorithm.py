"""Code shared by algorithms whose drafts are decoder layers over outputs of the target's layers."""

from __future__ import annotations

from functools import cached_property
from typing import cast

from specbatch.drafts.base import Algorithm
from specbatch.drafts.size import DraftSize, SizedDraft, draft_size
from specbatch.errors import UserError


class DecoderAlgorithm(Algorithm):
    """A draft algorithm whose section is a `SizedDraft`."""

    @cached_property
    def size(self) -> DraftSize:
        """The size of the draft's layers."""
        return draft_size(cast(SizedDraft, self.config.draft), self.target)

    @property
    def _layer_shape(self) -> dict[str, int]:
        """The fields of a `specbatch.drafts.memory.DecoderShape`."""
        size, target = self.size, self.target
        return {
            "hidden": target.hidden,
            "intermediate": size.intermediate,
            "heads": size.heads,
            "kv_heads": size.kv_heads,
            "head_dim": size.head_dim,
            "vocab": target.vocab,
        }

    def _check_readable(self, layers: tuple[int, ...], hint: str) -> None:
        """Check that engines can provide the outputs of the target's layers that are read.

        Args:
            layers: indices of the layers, ascending.
            hint: what to set instead.

        Raises:
            UserError: they can't.
        """
        last = self.target.layers - 2
        if layers[-1] > last:
            raise UserError(
                f"draft.aux_layers: {layers[-1]} can't be read: of the target's {self.target.layers} layers the last "
                f"that can be is {last}, since SGLang does not provide the last layer's output; {hint}"
            )

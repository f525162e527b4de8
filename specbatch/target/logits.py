"""Reads what a target computes between its head and the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specbatch.errors import UserError

_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier_scale", "output_multiplier")
"""Keys of factors on the logits: of Cohere, Falcon-H1, Grok and Muse."""
_DIVISOR = "logits_scaling"
"""Granite's."""
_CAP = "final_logit_softcapping"
"""Gemma's."""
_UNKNOWN = ("dim_model_base",)
"""Keys of unsupported changes: MiniCPM changes its states between final norm and head, and engines return them so."""


@dataclass(frozen=True)
class Logits:
    """Logits are ``cap · tanh(scale · (W h + b) / cap)``, in SGLang's order; without a cap, the outer function is left
    out. The bias ``b`` is a tensor, see `specbatch.target.head_bias`."""

    scale: float = 1.0
    cap: float | None = None


PLAIN = Logits()
"""No transformation."""


def logits_of(path: Path, text: dict[str, Any]) -> Logits:
    """Return the transformation of logits from the language model's configuration.

    Args:
        path: path of config.json, for messages.

    Raises:
        UserError: the target does something that is not supported.
    """
    for key in _UNKNOWN:
        if text.get(key) is not None:
            raise UserError(
                f"target.path: {path} changes its states before the head ({key}: {text[key]}), which the loss does not "
                "support: such targets can't be used yet"
            )
    scale = 1.0
    for key in _FACTORS:
        if text.get(key) is not None:
            scale *= float(text[key])
    if text.get(_DIVISOR) is not None:
        scale /= float(text[_DIVISOR])
    cap = text.get(_CAP)
    # SGLang's rule: a negative value means none.
    return Logits(scale, float(cap) if cap and cap > 0 else None)

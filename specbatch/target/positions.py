"""Reads a target's RoPE, in one form, and its longest context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specbatch.errors import UserError
from specbatch.target.configuration import CONTEXT_KEYS, full_attention_rope, layered, theta_of

_PLAIN = ("default", "mrope", "proportional")
"""Kinds for which the draft uses plain RoPE. Multimodal RoPE gives text the same angles as plain RoPE; `proportional`
leaves a share of a head's columns unrotated, which drafts do not do, as for every ``partial_rotary_factor``."""
_FACTORS = ("short_factor", "long_factor")


def rope_of(path: Path, text: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Return ``rope_theta``, a float, and ``rope_scaling``, a dict with ``rope_type`` or None.

    Args:
        path: of config.json, for messages.
        text: the language model's configuration.
        head_dim: head dimension of the target. A scaling with a factor for each pair of columns is valid only for that
            width; if the target rotates only a part of its heads, and so has fewer factors, the draft uses plain RoPE.

    Raises:
        UserError: neither the file nor its class has a theta.
    """
    block, theta = full_attention_rope(text), theta_of(text)
    if theta is None:
        raise UserError(
            f"{path}: no rope_theta, and transformers has none for model_type: {text.get('model_type', '')}; the "
            "draft uses its target's positions: add the value to the file"
        )
    kind = block.pop("rope_type", None) or block.pop("type", None) or "default"
    for key in ("type", "rope_theta", "partial_rotary_factor"):
        block.pop(key, None)
    factors = [block[key] for key in _FACTORS if key in block]
    if kind in _PLAIN or any(2 * len(factor) != head_dim for factor in factors):
        return {"rope_theta": theta, "rope_scaling": None}
    if kind == "longrope" and "original_max_position_embeddings" in text:
        block.setdefault("original_max_position_embeddings", text["original_max_position_embeddings"])
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **block}}


def max_positions(path: Path, text: dict[str, Any], rope: dict[str, Any]) -> int:
    """Return the longest context by SGLang's rule: a scaling factor counts unless the file says that it is included
    already, or scales only some layers.

    Raises:
        UserError: neither the file nor its class says how long it is.
    """
    scaling = rope["rope_scaling"] or {}
    counted = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3" or layered(text)
    for key in CONTEXT_KEYS:
        if text.get(key) is not None:
            return int(text[key] * (1 if counted else scaling.get("factor") or 1))
    raise UserError(
        f"{path}: no max_position_embeddings, and transformers has none for model_type: "
        f"{text.get('model_type', '')}; add the target's longest context to the file"
    )

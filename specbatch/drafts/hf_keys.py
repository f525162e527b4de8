"""Keys of config.json that drafts of all algorithms take from their target."""

from __future__ import annotations

from typing import Any

from specbatch.target import TargetShape


def rope_keys(target: TargetShape) -> dict[str, Any]:
    """Return the keys of RoPE, which the draft shares with its target, in the schemas of transformers 5 and earlier."""
    theta, scaling = target.rope["rope_theta"], dict(target.rope["rope_scaling"] or {})
    if scaling.get("rope_type") == "yarn":
        # Readers differ in its default.
        scaling.setdefault("original_max_position_embeddings", target.max_positions)
    scaling = {key: value for key, value in scaling.items() if value is not None}
    both: dict[str, Any] = {
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta},
    }
    if scaling:
        both["rope_scaling"] = scaling
    return both


def special_tokens(target: TargetShape) -> dict[str, Any]:
    """Return the ids of the target's tokens that begin, end and pad a text, as far as it has them."""
    tokens: dict[str, Any] = {"bos_token_id": target.bos, "pad_token_id": target.pad}
    if target.eos:
        tokens["eos_token_id"] = target.eos[0] if len(target.eos) == 1 else list(target.eos)
    return {name: value for name, value in tokens.items() if value is not None}

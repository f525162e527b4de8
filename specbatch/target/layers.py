"""Reads the layers of a target from its configuration: experts, and what each attention sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size")
_FULL = ("full_attention", "attention", "full", "deepseek_sparse_attention")
_RECURRENT = ("linear_attention", "mamba", "conv", "recurrent", "linear")
_DELTA_RULE_FLOPS = 6
"""Operations for each value of a linear layer's state and each token: read, correct and read it (Yang et al.,
arXiv:2412.06464, equation 10: two products of the state with a vector and an outer product)."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of a mixture."""

    count: int
    chosen: int
    """Number of experts that a token is sent to."""
    width: int
    """Width of an expert's MLP."""
    dense_first: bool
    """Whether the first layers have one dense MLP of ``intermediate_size`` instead."""


@dataclass(frozen=True)
class AttentionLayers:
    """Layers with the same attention."""

    layers: int
    pair_flops: int
    """Operations for one query and one key that it sees, over all heads of a layer: scores, and the sum of values."""
    window: int | None = None
    """Most tokens that a query sees; None for all before it."""
    token_flops: int = 0
    """Operations per token of a layer that keeps a state of fixed size instead."""


def experts_of(text: dict[str, Any]) -> Experts | None:
    """Return the routed experts; None for a dense model."""
    count, chosen = _first(text, _COUNTS), _first(text, _CHOSEN)
    if not count or count < 2 or not chosen:
        return None
    width = _first(text, _WIDTHS) or 4 * int(text.get("hidden_size") or 0)
    return Experts(count, chosen, width, dense_first=bool(text.get("first_k_dense_replace")))


def attention_of(text: dict[str, Any], *, layers: int, heads: int, head_dim: int) -> tuple[AttentionLayers, ...]:
    """Return the attention of the layers, by kind of layer.

    Args:
        text: the language model's configuration with its class's defaults, which define the kinds of layers.
        layers, heads, head_dim: shape of the target.
    """
    latent = text.get("kv_lora_rank") and text.get("qk_nope_head_dim")
    query = text["qk_nope_head_dim"] + text.get("qk_rope_head_dim", 0) if latent else head_dim
    value = text.get("v_head_dim") or query if latent else head_dim
    pair = 2 * heads * (query + value)
    kinds = _kinds(text, layers)
    recurrent = sum(kind in _RECURRENT for kind in kinds)
    full = sum(kind in _FULL for kind in kinds)
    found = []
    if full and text.get("index_topk"):
        # A cheap indexer scores all tokens, and attention reads those that it chooses.
        scores = 2 * int(text.get("index_n_heads") or 0) * int(text.get("index_head_dim") or 0)
        found += [AttentionLayers(full, scores), AttentionLayers(full, pair, int(text["index_topk"]))]
    elif full:
        found.append(AttentionLayers(full, pair))
    if recurrent:
        state = _number(text, "linear_num_value_heads") * _number(text, "linear_key_head_dim")
        state *= _number(text, "linear_value_head_dim")
        found.append(AttentionLayers(recurrent, 0, token_flops=_DELTA_RULE_FLOPS * state))
    if len(kinds) > full + recurrent:
        window = text.get("sliding_window") or text.get("attention_chunk_size")
        found.append(AttentionLayers(len(kinds) - full - recurrent, pair, int(window) if window else None))
    return tuple(found)


def _kinds(text: dict[str, Any], layers: int) -> list[str]:
    """Return the kind of each layer."""
    listed = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(listed, list) and listed:
        return [str(kind) for kind in listed[:layers]]
    every = text.get("full_attention_interval")
    if every and text.get("linear_num_value_heads"):
        return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
    pattern = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        if isinstance(pattern, int) and pattern > 1:
            return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
        return ["sliding_attention"] * layers
    return ["full_attention"] * layers


def _first(text: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((int(text[key]) for key in keys if isinstance(text.get(key), int)), None)


def _number(text: dict[str, Any], key: str) -> int:
    return int(text.get(key) or 0)

"""config.json of an EAGLE-3 draft, for three readers at once.

- SGLang and vLLM know ``LlamaForCausalLMEagle3`` and read a Llama's keys from the top level.
- speculators, and vLLM as soon as there is a ``speculators_config``, read ``transformer_layer_config`` and their own
  keys. Both halves are made from the same values, so that it does not matter who reads which.
- The ids of the captured layers mean two things: id ``k`` is the output of layer ``k`` to SGLang, which looks only
  into ``eagle_config``, and the hidden state after ``k`` layers to the others, which look at the top level first.
- RoPE stands in both schemas: ``rope_parameters`` for transformers 5, ``rope_theta`` and ``rope_scaling`` for others.
- No value is null: strict readers refuse that.
- SGLang puts the target's embedding in the place of the draft's wherever ``target_hidden_size`` is the draft's own
  width, and reads no other key. A draft that has trained its embedding therefore says that it reads one state as wide
  as all of them together, which comes to the same projection. speculators does not know that form, so its keys are left
  out then.
"""

from __future__ import annotations

from typing import Any

from specbatch.target import TargetShape

SPECULATORS_VERSION = "0.9.0"
"""Whose form this is."""


def draft_config(
    target: TargetShape,
    *,
    target_name: str,
    aux_layers: tuple[int, ...],
    intermediate: int,
    draft_vocab: int,
    draft_tokens: int,
    own_embedding: bool = False,
) -> dict[str, Any]:
    """The document.

    Args:
        target_name: path or hub name under which a reader finds the target.
        aux_layers: indices of the decoder layers whose outputs the draft reads, from 0, ascending.
        intermediate: width of the draft's MLP.
        draft_vocab: rows of the draft's head.
        draft_tokens: how many tokens to propose, where the server is not told.
        own_embedding: whether the checkpoint brings an embedding that is not the target's.
    """
    llama = {
        "model_type": "llama",
        "hidden_size": target.hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": target.heads,
        "num_key_value_heads": target.kv_heads,
        "head_dim": target.head_dim,
        "vocab_size": target.vocab,
        "max_position_embeddings": target.max_positions,
        "rms_norm_eps": target.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **_rope(target),
        **_special_tokens(target),
    }
    after = [layer + 1 for layer in aux_layers]
    draft = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **llama,
        "draft_vocab_size": draft_vocab,
        "target_hidden_size": target.hidden,
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(aux_layers)},
        "eagle_aux_hidden_state_layer_ids": after,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
    }
    if own_embedding:
        return draft | {"target_hidden_size": len(aux_layers) * target.hidden, "num_aux_hidden_states": 1}
    return draft | {
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": draft_tokens}],
            "verifier": {"name_or_path": target_name, "architectures": [target.architecture]},
        },
        "transformer_layer_config": {"architectures": ["LlamaForCausalLM"], **llama},
    }


def _rope(target: TargetShape) -> dict[str, Any]:
    """RoPE as the draft was trained, which is as its target was."""
    theta, scaling = target.rope["rope_theta"], dict(target.rope["rope_scaling"] or {})
    if scaling.get("rope_type") == "yarn":
        # Readers differ in what they take for it where it is left out.
        scaling.setdefault("original_max_position_embeddings", target.max_positions)
    scaling = {key: value for key, value in scaling.items() if value is not None}
    both: dict[str, Any] = {
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta},
    }
    if scaling:
        both["rope_scaling"] = scaling
    return both


def _special_tokens(target: TargetShape) -> dict[str, Any]:
    tokens: dict[str, Any] = {"bos_token_id": target.bos, "pad_token_id": target.pad}
    if target.eos:
        tokens["eos_token_id"] = target.eos[0] if len(target.eos) == 1 else list(target.eos)
    return {name: value for name, value in tokens.items() if value is not None}

"""config.json of an EAGLE-3 draft, for three readers at once.

- SGLang and vLLM support ``LlamaForCausalLMEagle3`` and read a Llama's keys from the top level.
- speculators, and vLLM if there is a ``speculators_config``, read ``transformer_layer_config`` and their own keys. Both
  halves are made from the same values, so it does not matter who reads which.
- The ids of the captured layers have two meanings. SGLang reads only ``eagle_config``, and for most of its classes
  (`specbatch.drafts.sglang`) id ``k`` is the output of layer ``k``. The other readers read the top level first, and for
  them it is the hidden state after ``k`` layers.
- RoPE is written in both schemas: ``rope_parameters`` for transformers 5, ``rope_theta`` and ``rope_scaling`` for
  others.
- No value is null, which strict readers refuse.
- ``norm_before_residual`` is always written: vLLM assumes true if there is a ``speculators_config`` without it.
  ``fc_norm`` and ``norm_output`` are written only if they are true, which all readers understand: some trainers read
  ``norm_output`` with another meaning.
- SGLang replaces the draft's embedding by the target's if ``target_hidden_size`` is the draft's own width, and reads no
  other key for this. A draft with a trained embedding therefore claims to read one state as wide as all of them
  together, which amounts to the same projection. speculators does not support that form, so its keys are left out then.
"""

from __future__ import annotations

from typing import Any

from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.hf_keys import rope_keys, special_tokens
from specbatch.drafts.sglang import layer_ids
from specbatch.target import TargetShape

SPECULATORS_VERSION = "0.9.0"
"""The version of speculators whose schema this is."""


def hf_config(
    target: TargetShape,
    shape: Shape,
    *,
    target_name: str,
    aux_layers: tuple[int, ...],
    draft_vocab: int,
    draft_tokens: int,
    own_embedding: bool = False,
) -> dict[str, Any]:
    """Return the document.

    Args:
        target_name: path or hub name under which a reader finds the target.
        aux_layers: indices of the decoder layers whose outputs the draft reads, from 0, ascending.
        draft_vocab: rows of the draft's head.
        draft_tokens: tokens to propose at a time unless the server sets another number.
        own_embedding: whether the checkpoint contains an embedding that is not the target's.
    """
    llama = {
        "model_type": "llama",
        "hidden_size": target.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": target.vocab,
        "max_position_embeddings": target.max_positions,
        "rms_norm_eps": target.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **rope_keys(target),
        **special_tokens(target),
    }
    ids, after = layer_ids(target.architecture, aux_layers), [layer + 1 for layer in aux_layers]
    draft = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **llama,
        "draft_vocab_size": draft_vocab,
        "target_hidden_size": target.hidden,
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": ids},
        "eagle_aux_hidden_state_layer_ids": after,
        "norm_before_residual": False,
        **{name: True for name in ("fc_norm", "norm_output") if getattr(shape, name)},
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

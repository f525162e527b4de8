"""Converts a GGUF file of a Llama model with a byte-level BPE tokenizer to a Hugging Face directory.

GGUF contains everything that is needed: weights (quantized ones become bfloat16), shape, tokenizer and chat template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL_TOKEN = 3
"""GGUF's number for tokens that are never text."""

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hugging_face_name(name: str) -> str:
    """Return a tensor's Hugging Face name: `model.layers.3.mlp.up_proj.weight` for `blk.3.ffn_up.weight`.

    Raises:
        ValueError: the tensor does not belong to a Llama model.
    """
    match name.split("."):
        case ["blk", layer, part, kind] if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
        case [part, kind] if part in OUTER_NAMES:
            return f"{OUTER_NAMES[part]}.{kind}"
    raise ValueError(f"{name} is not a tensor of a Llama model")


def rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows `[heads * head_dim, hidden]` of a query or key projection.

    Within each head, GGUF stores the two components of each rotated pair next to each other; Hugging Face has all first
    ones, then all second ones. In the wrong order the model writes fluent nonsense, and nothing fails.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_weights(reader: gguf.GGUFReader, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Return all weights under their Hugging Face names, as bfloat16."""
    weights = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        name = hugging_face_name(tensor.name)
        if name.endswith("q_proj.weight"):
            weight = rotary_halves(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = rotary_halves(weight, kv_heads)
        weights[name] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    return weights


def model_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Return `config.json`. It describes rotary embedding in a form that transformers 4 and 5 both read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        # Stored as float32: six digits restore 1e-05 from 9.999999747378752e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **special_ids(fields),
    }


def special_ids(fields: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the special tokens, by the names of `config.json` and `generation_config.json`."""
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer.

    Raises:
        ValueError: it differs in kind from SmolLM's (byte-level BPE in which each digit is a separate token).
    """
    kind = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the tokenizer is {kind[0]}/{kind[1]}; only gpt2/smollm is supported")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    result = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
        )
    )
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    result.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    result.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    if result.get_vocab_size() != len(tokens):
        raise ValueError(f"the tokenizer has {result.get_vocab_size()} tokens, the file {len(tokens)}")
    return result


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `tokenizer_config.json`, with the chat template of the file."""
    tokens = fields["tokenizer.ggml.tokens"]
    named = {name: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "padding", "unknown")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "bos_token": named["bos"],
        "eos_token": named["eos"],
        "pad_token": named["padding"],
        "unk_token": named["unknown"],
        "additional_special_tokens": [named["bos"], named["eos"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def convert(source: Path, directory: Path) -> None:
    """Write the model in ``source`` as a Hugging Face directory into the empty ``directory``.

    Raises:
        ValueError: ``source`` is not a Llama model with SmolLM's tokenizer.
    """
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{source} has a {fields['general.architecture']} model; only llama is supported")
    weights = read_weights(reader, fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors makes it readable only by its owner
    tokenizer(fields).save(str(directory / "tokenizer.json"))
    files = {
        "config.json": model_config(fields, tied="lm_head.weight" not in weights),
        "generation_config.json": special_ids(fields),
        "tokenizer_config.json": tokenizer_config(fields),
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

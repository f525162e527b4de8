"""Makes tiny random checkpoints of real classes; transformers saves them with the hub's names and layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
LAYERS, VOCAB, EOS = 8, 512, 2
LAST_FILE = "tokenizer_config.json"
"""File of a target's directory that is written last."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
"""Tokens 0, 1 and 2, as SmolLM2 has them."""
OF_IMAGES = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '[IMG]' }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": EOS, "sliding_window": 32,
}  # fmt: skip
"""Values that are set if a class has the key."""
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
LLAMA_4: dict[str, Any] = {"intermediate_size_mlp": 128, "num_experts_per_tok": 1}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64,
}  # fmt: skip
ROUTED = {"scoring_func": "sigmoid", "use_routing_bias": True, "topk_method": "noaux_tc", "moe_layer_freq": 1}


@dataclass(frozen=True)
class Architecture:
    """One kind of target."""

    model_type: str
    """Name of its configuration in transformers."""
    model_class: str
    """Name of its class in transformers."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Further values of its configuration, whether the class has the key or not."""
    published: dict[str, Any] = field(default_factory=dict)
    """Keys of the hub's config.json that transformers writes under other names."""
    renamed: tuple[str, str] | None = None
    """Prefix of tensor names as transformers saves them, and as the hub has them, if they differ."""
    sees: dict[str, Any] = field(default_factory=dict)
    """Further values of the configuration of its vision encoder."""
    images: bool = False
    """Whether its conversations have images."""


ARCHITECTURES = {
    "Llama": Architecture("llama", "LlamaForCausalLM"),
    "Qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "Qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "Qwen3-MoE": Architecture("qwen3_moe", "Qwen3MoeForCausalLM"),
    "Qwen3-Next": Architecture("qwen3_next", "Qwen3NextForCausalLM", LINEAR, {"full_attention_interval": 4}),
    "gpt-oss": Architecture("gpt_oss", "GptOssForCausalLM"),
    "DeepSeek-V3": Architecture("deepseek_v3", "DeepseekV3ForCausalLM", {**LATENT, "rope_parameters": YARN}, ROUTED),
    "GLM-4-MoE": Architecture("glm4_moe", "Glm4MoeForCausalLM"),
    "GLM-4-MoE-Lite": Architecture(
        "glm4_moe_lite", "Glm4MoeLiteForCausalLM", LATENT, {**ROUTED, "first_k_dense_replace": 1}
    ),
    "Gemma-2": Architecture("gemma2", "Gemma2ForCausalLM", {"query_pre_attn_scalar": 16}),
    "Gemma-3": Architecture("gemma3_text", "Gemma3ForCausalLM", {"query_pre_attn_scalar": 16}),
    "Mistral": Architecture("mistral", "MistralForCausalLM", {"sliding_window": None}),
    "Ministral-3": Architecture("ministral3", "Ministral3ForCausalLM", {"sliding_window": None}),
    "Phi-3": Architecture("phi3", "Phi3ForCausalLM", {"sliding_window": None}),
    "MiniMax-M2": Architecture("minimax_m2", "MiniMaxM2ForCausalLM", {}, {**ROUTED, "use_qk_norm": True}),
    "Granite": Architecture("granite", "GraniteForCausalLM", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "Llama-4-Text": Architecture("llama4_text", "Llama4ForCausalLM", LLAMA_4),
    "Apertus": Architecture("apertus", "ApertusForCausalLM"),
    "Gemma-4": Architecture(
        "gemma4_text", "Gemma4ForCausalLM", {"global_head_dim": 16, "hidden_size_per_layer_input": 0}
    ),
    "Qwen3-VL": Architecture("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "Gemma-3-Vision": Architecture(
        "gemma3", "Gemma3ForConditionalGeneration", {"query_pre_attn_scalar": 16},
        renamed=("vision_tower.", "vision_tower.vision_model."), sees={"vision_use_head": False},
    ),
    "Mistral-3": Architecture("mistral3", "Mistral3ForConditionalGeneration", {"sliding_window": None}),
    "Mistral-3-Images": Architecture(
        "mistral3", "Mistral3ForConditionalGeneration", {"sliding_window": None},
        {"image_token_index": len(SPECIAL)},
        sees={"image_size": 112, "head_dim": 16, "hidden_act": "silu"}, images=True,
    ),
    "Llama-4": Architecture("llama4", "Llama4ForConditionalGeneration", LLAMA_4),
}  # fmt: skip
"""All targets, by their names in the table."""
PICTURES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_hidden_layers": 1, "num_heads": 2,
    "num_attention_heads": 2, "out_hidden_size": 64, "vision_output_dim": 64, "projector_input_dim": 64,
    "projector_output_dim": 64, "image_size": 28, "patch_size": 14, "deepstack_visual_indexes": [0],
}  # fmt: skip
"""Shape of a target's vision encoder, as in `SHAPE`."""


def make_checkpoint(name: str, folder: Path) -> Path:
    """Write the directory of a tiny target with seeded random weights, and return it."""
    import transformers

    architecture = ARCHITECTURES[name]
    kind = transformers.CONFIG_MAPPING[architecture.model_type]
    defaults = kind().to_dict()
    nested = defaults["text_config"] if isinstance(defaults.get("text_config"), dict) else None
    values = _known(nested or defaults) | architecture.changes
    if nested is None:
        config = kind(**values)
    else:
        sees = {key: value for key, value in PICTURES.items() if key in defaults["vision_config"]}
        tied = nested.get("tie_word_embeddings")
        config = kind(
            text_config={**nested, **values},
            vision_config={**defaults["vision_config"], **sees, **architecture.sees},
            # Published ones have it in both places; SGLang reads one, and transformers the other.
            **({} if tied is None else {"tie_word_embeddings": tied}),
        )
    torch.manual_seed(0)
    model = getattr(transformers, architecture.model_class)(config).to(torch.bfloat16)
    _spread(model)
    model.save_pretrained(folder)
    if architecture.renamed:
        _rename(folder / "model.safetensors", *architecture.renamed)
    written = json.loads((folder / "config.json").read_text())
    if "kv_lora_rank" in written:
        written.pop("head_dim", None)  # the hub's files have none
    (folder / "config.json").write_text(json.dumps(written | architecture.published))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    tokenizer(OF_IMAGES if architecture.images else []).save(str(folder / "tokenizer.json"))
    if architecture.images:
        (folder / "preprocessor_config.json").write_text(json.dumps(_image_processor(written)))
        (folder / "processor_config.json").write_text(json.dumps(_processor(written)))
    tokens = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)) | {"pad_token": SPECIAL[2]}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "chat_template": CHATML, **tokens}
    (folder / LAST_FILE).write_text(json.dumps(about))
    return folder


def _rename(file: Path, old: str, new: str) -> None:
    tensors = load_file(file)
    named = {(new + name.removeprefix(old) if name.startswith(old) else name): tensors[name] for name in tensors}
    save_file(named, file, {"format": "pt"})


def _known(defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are set for a class, by the keys that it has."""
    values = {key: value for key, value in {**SHAPE, **EXPERTS, **LATENT}.items() if key in defaults}
    if "kv_lora_rank" not in defaults:
        values = {key: value for key, value in values.items() if key not in LATENT or key in SHAPE}
        if "num_key_value_heads" in values:
            values["num_key_value_heads"] = SHAPE["num_key_value_heads"]
    for key, value in defaults.items():
        # One entry per layer.
        if isinstance(value, list) and key in ("layer_types", "mlp_layer_types"):
            values[key] = (value * LAYERS)[:LAYERS] if len(value) >= 4 else [*value, *value * LAYERS][:LAYERS]
    return values


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    """Scale weights so that each layer changes its input, which transformers' own hardly do in so small a model."""
    generator = torch.Generator().manual_seed(1)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        if parameter.ndim == 1:
            parameter.copy_(parameter + 0.1 * noise(parameter))
        elif "embed" in name:
            parameter.copy_(noise(parameter))
        else:
            parameter.copy_(noise(parameter) / parameter.shape[-1] ** 0.5)


def _image_processor(config: dict[str, Any]) -> dict[str, Any]:
    sight = config["vision_config"]
    return {
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": sight["patch_size"],
        "size": {"longest_edge": sight["image_size"]},
    }


def _processor(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "processor_class": "PixtralProcessor",
        "patch_size": config["vision_config"]["patch_size"],
        "spatial_merge_size": config["spatial_merge_size"],
        **dict(zip(("image_token", "image_break_token", "image_end_token"), OF_IMAGES, strict=True)),
    }


def tokenizer(more: Sequence[str] = ()) -> Tokenizer:
    """Return a byte-level BPE tokenizer: every byte, the special tokens, and merges learned from the licence, which
    never changes.

    Args:
        more: further special tokens.
    """
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in [*SPECIAL, *more]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    result.train_from_iterator(TEXT.read_text(encoding="utf-8").splitlines(), trainer)
    assert result.get_vocab_size() == VOCAB
    return result

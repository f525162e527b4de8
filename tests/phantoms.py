"""Targets of real size without weights: config.json and tensor names as on the hub, headers over sparse files.

What is known of them is in their own config.json as published; `Phantom.gib` is what the published files come to.
Everything that reads a target's files can be tried on them in milliseconds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Names; safetensors' type and shape."""
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4}


@dataclass(frozen=True)
class Phantom:
    """One target."""

    config: dict[str, Any]
    tensors: Callable[[], Tensors]
    files: int = 4
    gib: int = 0

    def write(self, folder: Path, *, tokenizer: Path | None = None) -> Path:
        """Make its directory.

        Args:
            tokenizer: a directory whose tokenizer it gets.
        """
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        items = list(self.tensors().items())
        size = -(-len(items) // self.files)
        where: dict[str, str] = {}
        for number, first in enumerate(range(0, len(items), size), 1):
            name = f"model-{number:05d}-of-{self.files:05d}.safetensors"
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            at = 0
            for tensor, (dtype, shape) in items[first : first + size]:
                end = at + BYTES[dtype] * prod(shape)
                header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
                at, where[tensor] = end, name
            raw = json.dumps(header).encode()
            with (folder / name).open("wb") as file:
                file.write(struct.pack("<Q", len(raw)) + raw)
                file.truncate(8 + len(raw) + at)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        for path in tokenizer.glob("tokenizer*") if tokenizer else ():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder


def linear(name: str, rows: int, columns: int, form: str = "bf16") -> Tensors:
    """A matrix, as its format stores it."""
    if form == "fp8":
        return {
            f"{name}.weight": ("F8_E4M3", (rows, columns)),
            f"{name}.weight_scale_inv": ("F32", (-(-rows // 128), -(-columns // 128))),
        }
    if form == "fp8-rows":
        return {f"{name}.weight": ("F8_E4M3", (rows, columns)), f"{name}.weight_scale": ("BF16", (rows, 1))}
    if form == "int4":
        return {
            f"{name}.weight_packed": ("I32", (rows, columns // 8)),
            f"{name}.weight_scale": ("BF16", (rows, columns // 32)),
            f"{name}.weight_shape": ("I32", (2,)),
        }
    if form == "nvfp4":
        return {
            f"{name}.weight": ("U8", (rows, columns // 2)),
            f"{name}.weight_scale": ("F8_E4M3", (rows, columns // 16)),
            f"{name}.weight_scale_2": ("F32", ()),
        }
    if form == "awq":
        return {
            f"{name}.qweight": ("I32", (columns, rows // 8)),
            f"{name}.qzeros": ("I32", (columns // 128, rows // 8)),
            f"{name}.scales": ("BF16", (columns // 128, rows)),
        }
    if form == "gptq":
        return {
            f"{name}.qweight": ("I32", (columns // 8, rows)),
            f"{name}.qzeros": ("I32", (columns // 128, rows // 8)),
            f"{name}.scales": ("BF16", (columns // 128, rows)),
            f"{name}.g_idx": ("I32", (columns,)),
        }
    return {f"{name}.weight": ("BF16", (rows, columns))}


def mlp(prefix: str, hidden: int, width: int, form: str = "bf16") -> Tensors:
    return {
        **linear(f"{prefix}.gate_proj", width, hidden, form),
        **linear(f"{prefix}.up_proj", width, hidden, form),
        **linear(f"{prefix}.down_proj", hidden, width, form),
    }


def attention(prefix: str, c: dict[str, Any], form: str = "bf16") -> Tensors:
    hidden, heads, keys = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    width = c.get("head_dim") or hidden // heads
    return {
        **linear(f"{prefix}.q_proj", heads * width, hidden, form),
        **linear(f"{prefix}.k_proj", keys * width, hidden, form),
        **linear(f"{prefix}.v_proj", keys * width, hidden, form),
        **linear(f"{prefix}.o_proj", hidden, heads * width, form),
    }


def latent_attention(prefix: str, c: dict[str, Any], form: str = "bf16") -> Tensors:
    hidden, heads, rank, latent = c["hidden_size"], c["num_attention_heads"], c["q_lora_rank"], c["kv_lora_rank"]
    plain, rotated, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    return {
        **linear(f"{prefix}.q_a_proj", rank, hidden, form),
        **linear(f"{prefix}.q_b_proj", heads * (plain + rotated), rank, form),
        **linear(f"{prefix}.kv_a_proj_with_mqa", latent + rotated, hidden, form),
        **linear(f"{prefix}.kv_b_proj", heads * (plain + value), latent, form),
        **linear(f"{prefix}.o_proj", hidden, heads * value, form),
    }


def ends(c: dict[str, Any], prefix: str = "model.", head: str | None = "lm_head.weight") -> Tensors:
    rows = (c["vocab_size"], c["hidden_size"])
    own = {f"{prefix}embed_tokens.weight": ("BF16", rows), f"{prefix}norm.weight": ("BF16", rows[1:])}
    return own | ({head: ("BF16", rows)} if head else {})


def norms(prefix: str, c: dict[str, Any]) -> Tensors:
    names = ("input_layernorm", "post_attention_layernorm")
    return {f"{prefix}.{name}.weight": ("BF16", (c["hidden_size"],)) for name in names}


def dense(c: dict[str, Any], prefix: str = "model.", head: str | None = "lm_head.weight") -> Tensors:
    found: Tensors = {}
    for i in range(c["num_hidden_layers"]):
        at = f"{prefix}layers.{i}"
        found |= (
            norms(at, c) | attention(f"{at}.self_attn", c) | mlp(f"{at}.mlp", c["hidden_size"], c["intermediate_size"])
        )
    return found | ends(c, prefix, head)


def mixture(
    c: dict[str, Any],
    prefix: str = "model.",
    *,
    form: str = "bf16",
    experts_form: str | None = None,
    head: str = "lm_head.weight",
) -> Tensors:
    """Qwen3-MoE, and DeepSeek-V3 and GLM-4.5 with shared experts, dense first layers and a prediction layer."""
    found: Tensors = {}
    hidden, layers, width = c["hidden_size"], c["num_hidden_layers"], c["moe_intermediate_size"]
    count = c.get("num_experts") or c["n_routed_experts"]
    for i in range(layers + c.get("num_nextn_predict_layers", 0)):
        at = f"{prefix}layers.{i}"
        attend = latent_attention if "kv_lora_rank" in c else attention
        found |= norms(at, c) | attend(f"{at}.self_attn", c, form)
        if i < c.get("first_k_dense_replace", 0):
            found |= mlp(f"{at}.mlp", hidden, c["intermediate_size"], form)
        else:
            found[f"{at}.mlp.gate.weight"] = ("BF16", (count, hidden))
            for expert in range(count):
                found |= mlp(f"{at}.mlp.experts.{expert}", hidden, width, experts_form or form)
            if c.get("n_shared_experts"):
                found |= mlp(f"{at}.mlp.shared_experts", hidden, width * c["n_shared_experts"], form)
        if i >= layers:
            rows = (c["vocab_size"], hidden)
            found |= linear(f"{at}.eh_proj", hidden, 2 * hidden)
            found |= {f"{at}.embed_tokens.weight": ("BF16", rows), f"{at}.shared_head.head.weight": ("BF16", rows)}
    return found | ends(c, prefix, head)


def gpt_oss(c: dict[str, Any]) -> Tensors:
    found: Tensors = {}
    hidden, width, count = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= norms(at, c) | attention(f"{at}.self_attn", c)
        found[f"{at}.mlp.router.weight"] = ("BF16", (count, hidden))
        for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            found[f"{at}.mlp.experts.{name}_blocks"] = ("U8", (count, rows, columns // 32, 16))
            found[f"{at}.mlp.experts.{name}_scales"] = ("U8", (count, rows, columns // 32))
            found[f"{at}.mlp.experts.{name}_bias"] = ("BF16", (count, rows))
    return found | ends(c)


def stacked(c: dict[str, Any], prefix: str, head: str) -> Tensors:
    """Llama-4, and Qwen3.5-MoE with linear attention in three of four layers."""
    found: Tensors = {}
    hidden, count = c["hidden_size"], c.get("num_experts") or c["num_local_experts"]
    width = c.get("moe_intermediate_size") or c["intermediate_size"]
    linear_heads = c.get("linear_num_value_heads")
    for i in range(c["num_hidden_layers"]):
        at = f"{prefix}layers.{i}"
        found |= norms(at, c)
        if linear_heads and i % 4 != 3:
            values = linear_heads * c["linear_value_head_dim"]
            keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
            found |= linear(f"{at}.linear_attn.in_proj_qkv", 2 * keys + values, hidden)
            found |= linear(f"{at}.linear_attn.out_proj", hidden, values)
        else:
            found |= attention(f"{at}.self_attn", c)
        found[f"{at}.mlp.experts.gate_up_proj"] = ("BF16", (count, hidden, 2 * width))
        found[f"{at}.mlp.experts.down_proj"] = ("BF16", (count, width, hidden))
        found |= mlp(f"{at}.mlp.shared_expert", hidden, width)
    if linear_heads:
        found |= linear("mtp.layers.0.self_attn.q_proj", hidden, hidden)
    found |= linear("model.visual.blocks.0.attn.qkv", 3456, 1152)
    return found | ends(c, prefix, head)


def _qwen3(**own: Any) -> dict[str, Any]:
    return {
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        **own,
    }


QWEN3_8B = _qwen3(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    rope_theta=1000000,
)
LLAMA_8B = {
    **QWEN3_8B,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA_8B.pop("head_dim")
GPT_OSS_120B = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rope_theta": 150000,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "tie_word_embeddings": False,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 200002,
    "pad_token_id": 199999,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
GPT_OSS_20B = {
    **GPT_OSS_120B,
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
QWEN3_30B = _qwen3(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    num_experts=128,
    num_experts_per_tok=8,
    max_position_embeddings=262144,
    rope_theta=10000000,
)
QWEN3_235B = {
    **QWEN3_30B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "rope_theta": 5000000,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": FP8,
}
KIMI_TEXT = {
    **{key: value for key, value in DEEPSEEK.items() if key != "quantization_config"},
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "vocab_size": 163840,
    "max_position_embeddings": 262144,
    "rope_theta": 50000.0,
    "rope_scaling": {**DEEPSEEK["rope_scaling"], "factor": 64.0, "beta_fast": 32.0, "beta_slow": 1.0},
    "rms_norm_eps": 1e-5,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "pad_token_id": 163839,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}
        },
    },
}
KIMI = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "model_type": "kimi_k25",
    "text_config": KIMI_TEXT,
    "vision_config": {"hidden_size": 1152},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 163584,
    "eos_token_id": 163585,
}
GLM = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 160,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "vocab_size": 151552,
    "max_position_embeddings": 202752,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}
FP8_ROWS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
GEMMA3_TEXT = {
    "model_type": "gemma3_text",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}
"""Values that differ from the defaults of its class, as in published files."""
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": GEMMA3_TEXT,
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    "torch_dtype": "bfloat16",
}
GEMMA4_TEXT = {
    "model_type": "gemma4_text",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "vocab_size": 262144,
    "max_position_embeddings": 262144,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}
GEMMA4 = {**GEMMA3, "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4"} | {
    "text_config": GEMMA4_TEXT,
    "vision_config": {"hidden_size": 1152},
}
LLAMA4_TEXT = {
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "vocab_size": 202048,
    "max_position_embeddings": 10485760,
    "rope_theta": 500000.0,
    "rope_scaling": {**LLAMA_8B["rope_scaling"], "factor": 16.0},
    "rms_norm_eps": 1e-5,
}
LLAMA4 = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": LLAMA4_TEXT,
    "vision_config": {"hidden_size": 1408},
    "torch_dtype": "bfloat16",
}
QWEN35_TEXT = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
    },
    "full_attention_interval": 4,
    "eos_token_id": 248044,
}
QWEN35 = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": QWEN35_TEXT,
    "vision_config": {"hidden_size": 1152},
    "tie_word_embeddings": False,
}
MISTRAL_TEXT = {
    "model_type": "mistral",
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000000.0,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
MISTRAL = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": MISTRAL_TEXT,
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024},
    "torch_dtype": "bfloat16",
}

PHANTOMS = {
    "qwen3-8b": Phantom(QWEN3_8B, lambda: dense(QWEN3_8B), gib=15),
    "llama-3.1-8b": Phantom(LLAMA_8B, lambda: dense(LLAMA_8B), gib=15),
    "gpt-oss-20b": Phantom(GPT_OSS_20B, lambda: gpt_oss(GPT_OSS_20B), gib=13),
    "gpt-oss-120b": Phantom(GPT_OSS_120B, lambda: gpt_oss(GPT_OSS_120B), files=15, gib=61),
    "qwen3-30b-a3b": Phantom(QWEN3_30B, lambda: mixture(QWEN3_30B), files=16, gib=57),
    "qwen3-235b-a22b-fp8": Phantom(
        {**QWEN3_235B, "quantization_config": FP8}, lambda: mixture(QWEN3_235B, form="fp8"), files=24, gib=220
    ),
    "qwen3-235b-a22b-nvfp4": Phantom(
        {**QWEN3_235B, "quantization_config": {"quant_algo": "NVFP4", "quant_method": "modelopt"}},
        lambda: mixture(QWEN3_235B, form="nvfp4"),
        files=27,
        gib=125,
    ),
    "qwen3-235b-a22b-awq": Phantom(
        {**QWEN3_235B, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        lambda: mixture(QWEN3_235B, form="awq"),
        files=25,
        gib=116,
    ),
    "qwen3-235b-a22b-gptq": Phantom(
        {**QWEN3_235B, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        lambda: mixture(QWEN3_235B, form="gptq"),
        files=25,
        gib=116,
    ),
    "glm-4.6": Phantom(GLM, lambda: mixture(GLM), files=92, gib=664),
    "glm-4.6-fp8": Phantom(
        {**GLM, "quantization_config": FP8_ROWS}, lambda: mixture(GLM, form="fp8-rows"), files=93, gib=336
    ),
    "deepseek-v3.1": Phantom(DEEPSEEK, lambda: mixture(DEEPSEEK, form="fp8"), files=163, gib=641),
    "kimi-k2.5": Phantom(
        KIMI,
        lambda: mixture(KIMI_TEXT, "language_model.model.", experts_form="int4", head="language_model.lm_head.weight"),
        files=64,
        gib=554,
    ),
    "gemma-3-27b": Phantom(
        GEMMA3, lambda: dense({**GEMMA3_TEXT, "vocab_size": 262208}, "language_model.model.", None), gib=50
    ),
    "gemma-4-31b": Phantom(GEMMA4, lambda: dense(GEMMA4_TEXT, "model.language_model.", None), gib=58),
    "llama-4-scout": Phantom(
        LLAMA4, lambda: stacked(LLAMA4_TEXT, "language_model.model.", "language_model.lm_head.weight"), gib=200
    ),
    "qwen3.5-35b-a3b": Phantom(QWEN35, lambda: stacked(QWEN35_TEXT, "model.language_model.", "lm_head.weight"), gib=65),
    "mistral-small-3.2": Phantom(
        MISTRAL, lambda: dense(MISTRAL_TEXT, "language_model.model.", "language_model.lm_head.weight"), gib=44
    ),
}

"""The tensors of targets as their checkpoints name and store them, by the values of their config.json."""

from __future__ import annotations

from typing import Any

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Names; safetensors' type and shape."""


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

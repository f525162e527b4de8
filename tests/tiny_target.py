"""A target model that is made in a second: a random Llama with a real tokenizer and a ChatML template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tools.targets.checkpoints import SPECIAL, VOCAB, tokenizer

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 6, 64, 4, 2, 16, 128

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_target(directory: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Writes a Hugging Face directory and returns it: the same bytes for the same arguments."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    save_file(weights(tied, seed), directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2],
        "unk_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {"config": config, "generation_config": ids, "tokenizer_config": tokenizer_config}
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return directory


def weights(tied: bool, seed: int) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights, of a size that keeps activations and logits near 1."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(HIDDEN, generator=generator)).to(torch.bfloat16)

    result = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN) * HIDDEN**0.5, "model.norm.weight": norm()}
    for layer in range(LAYERS):
        result |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": norm(),
                "self_attn.q_proj": matrix(HEADS * HEAD_DIM, HIDDEN),
                "self_attn.k_proj": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.v_proj": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.o_proj": matrix(HIDDEN, HEADS * HEAD_DIM),
                "post_attention_layernorm": norm(),
                "mlp.gate_proj": matrix(INTERMEDIATE, HIDDEN),
                "mlp.up_proj": matrix(INTERMEDIATE, HIDDEN),
                "mlp.down_proj": matrix(HIDDEN, INTERMEDIATE),
            }.items()
        }
    if not tied:
        result["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    return result

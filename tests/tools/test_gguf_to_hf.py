"""A GGUF file becomes the model that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_target import HEADS, KV_HEADS, SPECIAL, make_tiny_target
from tools.target.gguf_to_hf import LAYER_NAMES, OUTER_NAMES, convert, hugging_face_name


def side_by_side(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order of rows: the two numbers that are turned together stand together."""
    order = []
    head_dim = weight.shape[0] // heads
    for head in range(heads):
        for pair in range(head_dim // 2):
            order += [head * head_dim + pair, head * head_dim + pair + head_dim // 2]
    return weight[order]


def gguf_name(name: str) -> str:
    layers = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
    outer = {theirs: ours for ours, theirs in OUTER_NAMES.items()}
    stem = name.removesuffix(".weight")
    if stem in outer:
        return f"{outer[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{layers[part]}.weight"


def write_gguf(model: Path, path: Path, architecture: str = "llama") -> None:
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint32("llama.vocab_size", config["vocab_size"])
    writer.add_uint32("llama.embedding_length", config["hidden_size"])
    writer.add_uint32("llama.feed_forward_length", config["intermediate_size"])
    writer.add_uint32("llama.block_count", config["num_hidden_layers"])
    writer.add_uint32("llama.attention.head_count", config["num_attention_heads"])
    writer.add_uint32("llama.attention.head_count_kv", config["num_key_value_heads"])
    writer.add_uint32("llama.rope.dimension_count", config["head_dim"])
    writer.add_uint32("llama.context_length", config["max_position_embeddings"])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32("llama.rope.freq_base", config["rope_theta"])
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(json.loads((model / "tokenizer_config.json").read_text())["chat_template"])
    for name, tensor in load_file(model / "model.safetensors").items():
        weight = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = side_by_side(weight, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_weights_configuration_and_tokenizer_come_back(tmp_path: Path, tied: bool):
    from transformers import AutoTokenizer

    model, back = make_tiny_target(tmp_path / "model", tied=tied), tmp_path / "back"
    write_gguf(model, tmp_path / "model.gguf")
    back.mkdir()
    convert(tmp_path / "model.gguf", back)

    expected, got = load_file(model / "model.safetensors"), load_file(back / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    config = json.loads((back / "config.json").read_text())
    assert json.loads((model / "config.json").read_text()).items() <= config.items()
    text = "Hello <|im_end|> in 2024"
    conversation = [{"role": "user", "content": "Hello"}]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (model, back)]
    rendered = {tokenizer.apply_chat_template(conversation, tokenize=False) for tokenizer in tokenizers}
    assert len(rendered) == 1
    assert tokenizers[1].decode(tokenizers[1](text)["input_ids"]) == text
    assert tokenizers[1].convert_ids_to_tokens(tokenizers[1]("2024")["input_ids"]) == ["2", "0", "2", "4"]


def test_another_architecture_is_refused(tmp_path: Path):
    write_gguf(make_tiny_target(tmp_path / "model"), tmp_path / "model.gguf", architecture="qwen2")
    with pytest.raises(ValueError, match="has a qwen2 model"):
        convert(tmp_path / "model.gguf", tmp_path)


def test_an_unknown_tensor_is_refused():
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.bias\.more is not a tensor of a Llama model"):
        hugging_face_name("blk.0.attn_q.bias.more")


@pytest.mark.light
def test_the_quickstarts_target_knows_the_capital_of_france(smollm: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"
    assert {"LICENSE", "PROVENANCE.md"} <= {file.name for file in smollm.iterdir()}

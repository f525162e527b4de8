"""Targets whose files contradict what SGLang or the training would do with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbatch.checks import check
from specbatch.inference import arguments
from tests.checks.messages import refused


def test_tokens_without_a_row_in_the_embedding_are_refused_by_name(load, changed):
    def added(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 512, "content": "<|tool|>"})

    message = refused(load(target=changed(added)))
    assert "has 1 tokens that its embedding of 512 rows (vocab_size) has no row for: <|tool|> (512)" in message


def test_rows_of_the_embedding_without_a_token_are_none_for_the_draft(load, changed):
    def fewer(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        for token in [token for token, i in vocabulary.items() if i >= 500]:
            del vocabulary[token]

    target = changed(fewer)
    assert refused(load("--draft.vocab_size=512", target=target)).startswith(
        "draft.vocab_size: 512 is more than the target's 500 tokens"
    )
    assert check(load("--draft.vocab_size=500", target=target)) == []


def test_a_head_that_sglang_would_not_use_is_warned_of(load, changed):
    target = changed(tie_word_embeddings=True)
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, target / "model.safetensors")
    (warning,) = check(load(target=target))
    assert "stores lm_head.weight, which differs from its embedding" in warning
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, target / "model.safetensors")
    assert check(load(target=target)) == []


@pytest.mark.parametrize("bfloat16", [True, False])
def test_a_float32_target_is_warned_of_where_sglang_would_compute_in_float16(load, changed, monkeypatch, bfloat16):
    # A CPU without instructions for bfloat16 computes in float32.
    monkeypatch.setattr(arguments, "cpu_multiplies_bfloat16", lambda: bfloat16)
    target = changed(torch_dtype="float32", dtype="float32")
    here, elsewhere = check(load(target=target)), check(load(target=target), here=False)
    assert (len(here), len(elsewhere)) == (bfloat16, 1)
    for warning in (*here, *elsewhere):
        assert warning.startswith("target.dtype: auto: the checkpoint is float32, which SGLang computes in float16")
    assert check(load("--target.dtype=float32", target=target)) == []


def test_a_target_with_code_of_its_own_is_warned_of_until_it_is_trusted(load, changed):
    target = changed(auto_map={"AutoConfig": "configuration_tiny.TinyConfig"})
    (warning,) = check(load(target=target))
    assert warning.startswith("target.trust_remote_code: false: ")
    assert check(load("--target.trust_remote_code", target=target)) == []

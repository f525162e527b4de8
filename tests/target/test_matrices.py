"""Embedding and head are found among the tensors of real files, whole, divided or damaged."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbatch.errors import UserError
from specbatch.target import embedding, embedding_name, head_bias, head_name, lm_head, read_target


def without_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("lm_head.weight", None)


def test_a_tied_target_without_a_head_has_its_embedding_as_head(variant):
    shape = read_target(variant(lambda config: config.update(tie_word_embeddings=True), without_head))
    assert head_name(shape) == embedding_name(shape) == "model.embed_tokens.weight"
    assert torch.equal(lm_head(shape), embedding(shape))
    assert (lm_head(shape).dtype, tuple(lm_head(shape).shape)) == (torch.bfloat16, (shape.vocab, shape.hidden))


def test_an_untied_target_without_a_head_is_refused_by_tensor_and_file(variant):
    folder = variant(lambda config: config.update(tie_word_embeddings=False), without_head)
    with pytest.raises(UserError, match=r"no tensor lm_head\.weight in model\.safetensors") as caught:
        lm_head(read_target(folder))
    assert str(folder) in str(caught.value)


def test_a_tied_target_that_stores_another_head_uses_its_embedding(variant):
    def other_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])

    shape = read_target(variant(lambda config: config.update(tie_word_embeddings=True), other_head))
    assert torch.equal(lm_head(shape), embedding(shape))
    assert not shape.weights.same("lm_head.weight", "model.embed_tokens.weight")


def test_an_untied_target_has_a_head_of_its_own(tiny_target):
    shape = read_target(tiny_target)
    assert not shape.tied
    assert not torch.equal(lm_head(shape), embedding(shape))


def test_shards_are_read_through_their_index(variant):
    folder = variant()
    whole = read_target(folder)
    first, second = embedding(whole), lm_head(whole)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in halves.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    shape = read_target(folder)
    assert torch.equal(embedding(shape), first)
    assert torch.equal(lm_head(shape), second)

    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"should be in model-00002-of-00002\.safetensors, which is missing"):
        lm_head(read_target(folder))


def test_a_file_that_was_cut_off_or_is_none_is_refused(variant):
    folder = variant()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match="reaches beyond the end of the file"):
        embedding(read_target(folder))
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="not a safetensors file"):
        embedding(read_target(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        embedding(read_target(folder))


def test_an_embedding_of_another_size_than_config_json_says_is_refused(variant):
    def padded(config: dict[str, Any]) -> None:
        config["vocab_size"] += 64

    with pytest.raises(UserError, match=r"which tensor is the embedding, \[576, 64\] by config.json"):
        embedding(read_target(variant(padded)))


def test_the_bias_of_a_head_is_read(variant):
    def biased(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.bias"] = torch.arange(tensors["lm_head.weight"].shape[0]).bfloat16()

    shape = read_target(variant(None, biased))
    bias = head_bias(shape)
    assert bias is not None
    assert torch.equal(bias, torch.arange(shape.vocab).bfloat16())
    assert head_bias(read_target(variant())) is None


def test_a_prediction_layer_holds_copies_that_are_not_the_models_own(variant):
    def predicting(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("embed_tokens.weight", "shared_head.head.weight", "lm_head.weight"):
            tensors[f"model.layers.6.{name}"] = torch.zeros(512, 64)
        tensors["mtp.0.embed_tokens.weight"] = torch.zeros(512, 64)

    shape = read_target(variant(None, predicting))
    assert embedding_name(shape) == "model.embed_tokens.weight"
    assert head_name(shape) == "lm_head.weight"


def test_rows_behind_the_vocabulary_are_padding(variant):
    def smaller(config: dict[str, Any]) -> None:
        config["vocab_size"] = 500

    whole, shape = read_target(variant()), read_target(variant(smaller))
    assert torch.equal(embedding(shape), embedding(whole)[:500])
    assert torch.equal(lm_head(shape), lm_head(whole)[:500])

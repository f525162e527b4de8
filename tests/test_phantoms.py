"""Targets that people have, at their real size and in the hub's own layout, as far as no weights are needed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from specbatch.checks.target import check_logits
from specbatch.config import Config, Data, Run, Target
from specbatch.drafts.base import algorithm_of
from specbatch.drafts.block.algorithm import DFlash
from specbatch.drafts.block.config import DFlashDraft
from specbatch.drafts.eagle3.algorithm import Eagle3
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.drafts.eagle3.hf_config import hf_config
from specbatch.drafts.size import DraftSize, draft_size
from specbatch.errors import UserError
from specbatch.planning.flops import active_weights
from specbatch.target import Logits, attention, embedding_name, head_name, read_target
from tests.phantoms import PHANTOMS
from tests.phantoms.configs import DEEPSEEK

Of = Callable[[str], Path]
BILLIONS = {
    "qwen3-8b": (6.95, "bf16"),
    "llama-3.1-8b": (6.98, "bf16"),
    "gpt-oss-20b": (3.03, "mxfp4"),
    "gpt-oss-120b": (4.55, "mxfp4"),
    "qwen3-30b-a3b": (2.73, "bf16"),
    "qwen3-235b-a22b-fp8": (20.95, "fp8"),
    "qwen3-235b-a22b-nvfp4": (20.95, "nvfp4"),
    "qwen3-235b-a22b-awq": (20.95, "int4"),
    "qwen3-235b-a22b-gptq": (20.95, "int4"),
    "glm-4.6-fp8": (32.08, "fp8"),
    "deepseek-v3.1": (35.70, "fp8"),
    "kimi-k2.5": (30.51, "int4"),
    "gemma-3-27b": (25.60, "bf16"),
    "gemma-4-31b": (28.74, "bf16"),
    "llama-4-scout": (15.10, "bf16"),
    "qwen3.5-35b-a3b": (2.08, "bf16"),
    "mistral-small-3.2": (22.23, "bf16"),
}
"""Weights that compute a token, without embedding and head, and their format. With them the vendors' figures: 22 B for
Qwen3-235B-A22B, 3.6 and 5.1 B for gpt-oss, 32 B for GLM-4.6 and Kimi-K2.5, 37 B for DeepSeek-V3, 17 B for Llama-4."""
DRAFTS = {
    "qwen3-8b": (32, 8, 128, 12288),
    "llama-3.1-8b": (32, 8, 128, 14336),
    "gpt-oss-20b": (64, 8, 64, 17280),
    "gpt-oss-120b": (64, 8, 64, 17280),
    "qwen3-30b-a3b": (32, 4, 128, 12288),
    "qwen3-235b-a22b-fp8": (64, 4, 128, 24576),
    "glm-4.6-fp8": (40, 8, 128, 12288),
    "deepseek-v3.1": (56, 8, 128, 18432),
    "kimi-k2.5": (56, 8, 128, 18432),
    "llama-4-scout": (40, 8, 128, 30720),
    "qwen3.5-35b-a3b": (16, 2, 256, 12288),
}
"""Heads, key heads, width and MLP by default. Published: the same for Qwen3 and gpt-oss, 56 and 8
heads for DeepSeek-V3."""


@pytest.mark.parametrize("name", sorted(BILLIONS))
def test_a_target_of_real_size_is_read_right(name: str, phantom: Of):
    shape = read_target(phantom(name))
    gib = sum(file.stat().st_size for file in shape.path.glob("*.safetensors")) / 2**30
    assert gib == pytest.approx(PHANTOMS[name].gib, rel=0.08)
    assert embedding_name(shape).endswith("model.embed_tokens.weight") or "language_model" in embedding_name(shape)
    assert ".layers." not in embedding_name(shape) + head_name(shape)
    assert shape.tied == name.startswith("gemma")
    billions, form = BILLIONS[name]
    found = active_weights(shape)
    assert found.count / 1e9 == pytest.approx(billions, abs=0.006)
    assert found.format == form
    assert shape.dtype == "bfloat16"
    text = PHANTOMS[name].config.get("text_config", PHANTOMS[name].config)
    assert shape.rope["rope_theta"] >= 1e4
    assert sum(kind.layers for kind in attention(shape)) == text["num_hidden_layers"]
    if name in DRAFTS:
        size = draft_size(Eagle3Draft(), shape)
        assert (size.heads, size.kv_heads, size.head_dim, size.intermediate) == DRAFTS[name]
        assert shape.hidden % size.heads == 0


def test_a_short_text_config_gets_its_classs_defaults(phantom: Of):
    shape = read_target(phantom("gemma-3-27b"))
    assert (shape.vocab, shape.max_positions, shape.rms_norm_eps) == (262208, 131072, 1e-6)
    assert shape.rope == {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert (shape.eos, shape.bos) == ((1, 106), 2)
    assert [(kind.layers, kind.window) for kind in attention(shape)] == [(10, None), (52, 1024)]


def test_layers_that_do_not_see_everything_are_known(phantom: Of):
    def kinds(name: str) -> list[tuple[int, int | None, int]]:
        shape = read_target(phantom(name))
        return [(kind.layers, kind.window, kind.token_flops) for kind in attention(shape)]

    assert kinds("gpt-oss-120b") == [(18, None, 0), (18, 128, 0)]
    assert kinds("qwen3.5-35b-a3b") == [(10, None, 0), (30, None, 6 * 32 * 128 * 128)]
    assert kinds("llama-4-scout") == [(12, None, 0), (36, 8192, 0)]
    assert read_target(phantom("gemma-4-31b")).logits == Logits(1.0, 30.0)


@pytest.mark.parametrize("name", sorted(DRAFTS))
def test_engines_load_the_configuration_of_a_draft(name: str, phantom: Of):
    """transformers checks that heads divide the hidden size, SGLang and vLLM read the rest by it."""
    from transformers import LlamaConfig

    shape = read_target(phantom(name))
    config = Config(Run(""), Target(str(shape.path)), Data(train=[]), draft=Eagle3Draft())
    draft = Eagle3(config, shape).shape
    written = hf_config(shape, draft, target_name=name, aux_layers=(1, 2, 3), draft_vocab=32000, draft_tokens=3)
    read = LlamaConfig(**written)
    assert (read.num_attention_heads, read.num_key_value_heads, read.head_dim, read.intermediate_size) == DRAFTS[name]
    assert read.rope_parameters["rope_theta"] == shape.rope["rope_theta"]


def test_a_directory_of_two_hundred_thousand_tensors_is_read_in_a_second(phantom: Of):
    folder = phantom("kimi-k2.5")
    read_target(folder)  # imports transformers, since its text_config is nested
    begun = time.process_time()
    shape = read_target(folder)
    names = embedding_name(shape), head_name(shape)
    assert time.process_time() - begun < 1.5
    assert len(shape.weights.tensors) > 200_000
    assert names == ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def test_a_shape_that_is_given_is_taken_and_checked(tmp_path: Path):
    (tmp_path / "deepseek").mkdir()
    (tmp_path / "deepseek" / "config.json").write_text(json.dumps(DEEPSEEK))
    shape = read_target(tmp_path / "deepseek")
    given = Eagle3Draft(num_attention_heads=64, num_key_value_heads=64, head_dim=64, intermediate_size=12288)
    assert draft_size(given, shape) == DraftSize(64, 64, 64, 12288)
    with pytest.raises(UserError, match=r"draft\.num_attention_heads: 60 does not divide .* 7168.*; try 56"):
        draft_size(Eagle3Draft(num_attention_heads=60), shape)
    with pytest.raises(UserError, match=r"draft\.num_key_value_heads: 16 does not divide the draft's 56 .*; try 14"):
        draft_size(Eagle3Draft(num_key_value_heads=16), shape)
    with pytest.raises(UserError, match=r"draft\.head_dim: 63"):
        draft_size(Eagle3Draft(head_dim=63), shape)


def test_snapshots_of_a_draft_that_has_its_targets_heads_say_nothing_of_them(phantom: Of):
    """Snapshots equal those from before drafts had heads of their own."""

    def facts(name: str) -> dict[str, object]:
        config = Config(Run(""), Target(name), Data(train=[]), draft=Eagle3Draft())
        return Eagle3(config, read_target(phantom(name))).facts()

    of_llama, of_deepseek = facts("llama-3.1-8b"), facts("deepseek-v3.1")
    assert of_llama["intermediate_size"] == 14336
    assert set(of_deepseek) - set(of_llama) == {"num_attention_heads", "num_key_value_heads"}
    assert (of_deepseek["num_attention_heads"], of_deepseek["num_key_value_heads"]) == (56, 8)


def test_an_algorithm_that_does_not_know_softcaps_is_refused(phantom: Of):
    shape = read_target(phantom("gemma-4-31b"))
    config = Config(Run(""), Target(str(shape.path)), Data(train=[]), draft=DFlashDraft())

    class Simple(DFlash):
        changed_logits = False

    with pytest.raises(UserError, match=r"draft\.algorithm: dflash does not support what .* does to its logits"):
        check_logits(Simple(config, shape))
    for draft in (DFlashDraft(), Eagle3Draft()):
        check_logits(algorithm_of(replace(config, draft=draft), shape))

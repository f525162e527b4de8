"""Checks against SGLang's source and its own resolution of arguments, before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specbatch.config import load_config
from specbatch.errors import UserError
from specbatch.gpu_kinds import GPUS
from specbatch.inference.accelerator import has_bfloat16
from specbatch.inference.classes import capturing_classes, check_class
from specbatch.inference.resolution import (
    cache_bytes,
    check_blocks,
    check_engine,
    check_quantization,
    check_room,
    resolve,
    stored_bytes,
)
from specbatch.target import read_target
from tests.phantoms import PHANTOMS
from tests.phantoms.configs import DEEPSEEK

HERE = Path("/models/some")


def test_a_class_captures_that_inherits_or_hands_on_the_method():
    for phantom in PHANTOMS.values():
        check_class(phantom.config["architectures"][0], HERE)
    for inherits in (
        "MistralForCausalLM",
        "Mistral3ForConditionalGeneration",
        "Phi3ForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",
    ):
        check_class(inherits, HERE)


def test_a_class_that_does_not_capture_is_refused_with_near_ones():
    with pytest.raises(UserError) as refused:
        check_class("PixtralForConditionalGeneration", HERE)
    message = str(refused.value)
    assert "hands out no hidden states of its class PixtralForConditionalGeneration" in message
    assert f"for {len(capturing_classes())} classes; near ones are" in message
    assert "MistralForCausalLM" in message.split("near ones are")[1]
    with pytest.raises(
        UserError, match=r"Llama4ForCausalLM, and SGLang .* leaves the experts' weights .* Llama4ForCond"
    ):
        check_class("Llama4ForCausalLM", HERE)
    with pytest.raises(UserError, match="has no class of that name"):
        check_class("NoSuchForCausalLM", HERE)


def test_the_classes_that_capture_are_those_of_sglangs_registry():
    """Counted once by importing all of SGLang 0.5.23: 71. The plugin adds one."""
    found = capturing_classes()
    assert len(found) == 72
    assert {"LlamaForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "Mistral3ForConditionalGeneration"} < set(
        found
    )
    assert not {"GraniteForCausalLM", "Gemma2ForCausalLM"} & set(found)


def config_of(target: Path, tmp_path: Path, *overrides: str) -> Any:
    path = tmp_path / "a.yaml"
    path.write_text(f"run: {{dir: r}}\ntarget: {{path: '{target}'}}\ndata: {{train: [a]}}\ninference: {{gpu: h100}}\n")
    return load_config(path, overrides)


def test_experts_are_not_cut_inside_a_block(phantom: Callable[[str], Path], tmp_path: Path):
    folder = phantom("qwen3-235b-a22b-fp8")
    shape = read_target(folder)
    with pytest.raises(UserError, match=r"tensor_parallel: 8 cuts .* experts of 1536 .* try 4, or .*ep_size: 8"):
        check_blocks(config_of(folder, tmp_path, "--inference.tensor_parallel=8"), shape)
    check_blocks(config_of(folder, tmp_path, "--inference.tensor_parallel=4"), shape)
    check_blocks(config_of(folder, tmp_path, "--inference.tensor_parallel=8", "--inference.sglang={ep_size: 8}"), shape)


def test_a_target_needs_room_beside_its_longest_sample(phantom: Callable[[str], Path], tmp_path: Path):
    deepseek, qwen = read_target(phantom("deepseek-v3.1")), read_target(phantom("qwen3-8b"))
    assert stored_bytes(deepseek) >> 30 == 641
    assert cache_bytes(deepseek, 8) == 2 * 61 * (DEEPSEEK["kv_lora_rank"] + DEEPSEEK["qk_rope_head_dim"])
    assert cache_bytes(qwen, 2) == 2 * 36 * 2 * 4 * 128
    eight = config_of(deepseek.path, tmp_path, "--inference.tensor_parallel=8")
    check_room(eight, deepseek, GPUS["h200"], 0.89)
    with pytest.raises(UserError, match=r"641 GiB .* is 80\.4 GiB, but SGLang uses only 0\.830 .* try .*parallel: 16"):
        check_room(eight, deepseek, GPUS["h100"], 0.83)
    alone = config_of(qwen.path, tmp_path)
    with pytest.raises(UserError, match=r"uses only -0\.219 .* try inference\.sglang\.mem_fraction_static: 0\.8"):
        check_room(alone, qwen, GPUS["h100"], -0.219)


def test_a_target_that_is_not_quantised_is_not_loaded_as_if(phantom: Callable[[str], Path], tmp_path: Path):
    plain, stored = phantom("qwen3-8b"), phantom("qwen3-235b-a22b-awq")
    told = "--inference.sglang={quantization: awq}"
    with pytest.raises(UserError, match=r"inference\.sglang\.quantization: awq needs a checkpoint that is stored so"):
        check_quantization(config_of(plain, tmp_path, told), read_target(plain))
    check_quantization(config_of(stored, tmp_path, told), read_target(stored))
    check_quantization(config_of(plain, tmp_path, "--inference.sglang={quantization: fp8}"), read_target(plain))


def test_nothing_is_asked_where_no_gpu_is_named(phantom: Callable[[str], Path], tmp_path: Path):
    config = config_of(phantom("qwen3-8b"), tmp_path, "--inference.gpu=")
    assert check_engine(config, read_target(config.target.path)) == []


@pytest.mark.light
def test_sglang_settles_its_arguments_for_a_gpu_that_is_not_there(phantom: Callable[[str], Path]):
    """gpt-oss's format is registered with CUDA's libraries only; a backend that is none is refused by SGLang."""
    arguments = {"model_path": str(phantom("gpt-oss-120b")), "skip_tokenizer_init": True, "tp_size": 2}
    settled, why = resolve(arguments, GPUS["h100"])
    assert settled is not None, why
    assert settled["attention_backend"] == "fa3"
    assert 0.8 < settled["mem_fraction_static"] < 0.9
    with pytest.raises(UserError, match=r"SGLang refuses .* on an NVIDIA A100.*invalid choice: 'none_such'"):
        resolve(arguments | {"attention_backend": "none_such"}, GPUS["a100"])


def test_instructions_for_bfloat16_are_looked_for_by_their_names():
    assert has_bfloat16("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n")
    assert has_bfloat16("Features\t: fp asimd bf16 i8mm\n")
    assert not has_bfloat16("flags\t\t: fpu avx2 avx512f\nbugs\t: avx512_bf16\n")
    assert replace(GPUS["h100"], memory_mib=1).memory_bytes == 1 << 20

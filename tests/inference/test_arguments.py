"""The arguments of engines, with and without a GPU."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from specbatch.config import Config, Data, Inference, Run, Target
from specbatch.drafts.sglang import COUNTS_INPUTS, layer_ids, outputs_of
from specbatch.errors import UserError
from specbatch.inference import arguments
from specbatch.inference.arguments import engine_arguments, engine_environment, memory_fraction, start_timeout_s
from specbatch.target import TargetShape, read_target
from tests.tiny_target import make_tiny_target

H100 = 80 << 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TargetShape:
    return read_target(str(make_tiny_target(tmp_path_factory.mktemp("target") / "tiny")))


@pytest.fixture
def llama_8b(tiny: TargetShape) -> TargetShape:
    return replace(tiny, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, layers=32)


def config(max_tokens: int = 4096, **inference: object) -> Config:
    data = Data(train=["data"], max_tokens=max_tokens)
    return Config(Run(dir="run"), Target(path="target"), data, inference=Inference(**inference))


@pytest.mark.parametrize(("max_tokens", "least"), [(4096, 0.87), (16384, 0.85), (32768, 0.75), (65536, 0.6)])
def test_an_uncut_prefill_leaves_an_8b_target_its_memory(llama_8b: TargetShape, max_tokens: int, least: float) -> None:
    assert least <= memory_fraction(config(max_tokens), llama_8b, H100) <= 0.9


def test_a_prefill_that_needs_the_whole_gpu_is_refused(llama_8b: TargetShape) -> None:
    with pytest.raises(UserError, match=r"inference\.deterministic: true: a prefill of 262144 tokens"):
        memory_fraction(config(262144), llama_8b, H100)
    assert memory_fraction(config(262144, tensor_parallel=8), llama_8b, H100) > 0.3


def test_bits_that_depend_on_the_pack_alone_take_sglang_s_own_kernels_on_a_gpu(
    tiny: TargetShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = config(deterministic=True)
    assert "enable_deterministic_inference" not in engine_arguments(exact, tiny)
    monkeypatch.setattr(arguments, "accelerator_bytes", lambda: H100)
    found = engine_arguments(exact, tiny)
    assert found["enable_deterministic_inference"] is True
    assert found["chunked_prefill_size"] == -1
    assert found["mem_fraction_static"] == pytest.approx(0.9, abs=0.05)
    assert engine_arguments(config(deterministic=True, sglang={"mem_fraction_static": 0.5}), tiny)[
        "mem_fraction_static"
    ] == pytest.approx(0.5)
    assert "mem_fraction_static" not in engine_arguments(config(), tiny), "SGLang's own rule"


def test_nothing_is_made_that_no_prefill_uses(tiny: TargetShape) -> None:
    assert engine_arguments(config(), tiny)["disable_decode_cuda_graph"] is True
    assert {"disable_decode_cuda_graph", "enable_deterministic_inference"} <= arguments.sglang_argument_names()
    assert engine_environment(config(), tiny)["SGLANG_JIT_DEEPGEMM_FAST_WARMUP"] == "1"


def test_a_large_target_has_longer_to_start(tiny: TargetShape) -> None:
    assert start_timeout_s(config(), tiny) == pytest.approx(900, abs=1)
    assert start_timeout_s(config(start_timeout_s=60), tiny) == 60


@pytest.mark.parametrize("outputs", [(1, 29, 57), (2, 30, 57), (5, 6, 7)])
@pytest.mark.parametrize("architecture", ["DeepseekV3ForCausalLM", "Qwen3ForCausalLM"])
def test_ids_that_sglang_is_given_mean_the_outputs_of_layers(architecture: str, outputs: tuple[int, ...]) -> None:
    ids = layer_ids(architecture, outputs)
    assert outputs_of(architecture, ids) == list(outputs)
    # As DeepSeek's class does it; the others take all ids for outputs.
    read_before = [i + 1 for i in ids] if "Deepseek" not in architecture or ids[0] == 1 else ids
    assert [layer - 1 for layer in read_before] == list(outputs)


def test_a_layer_that_the_class_does_not_give_out_is_refused() -> None:
    with pytest.raises(UserError, match=r"draft\.aux_layers: .*DeepseekV3ForCausalLM does not provide .* layer 0"):
        layer_ids("DeepseekV3ForCausalLM", (0, 2, 5))


def test_the_classes_that_count_inputs_are_those_of_the_installed_sglang() -> None:
    found = importlib.util.find_spec("sglang")
    assert found is not None
    assert found.submodule_search_locations
    models = Path(found.submodule_search_locations[0]) / "srt" / "models"
    counting: set[str] = set()
    bases: dict[str, set[str]] = {}
    for path in models.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "layer_ids[0] == 1" not in text and not any(name in text for name in COUNTS_INPUTS):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
                if "layer_ids[0] == 1" in (ast.get_source_segment(text, node) or ""):
                    counting.add(node.name)
    while more := {name for name, of in bases.items() if of & counting} - counting:
        counting |= more
    # Kimi's holds one of DeepSeek's. The targets' own draft classes are not targets, and LongCat's overrides it.
    drafts = {name for name in counting if name.endswith(("NextN", "Eagle"))}
    assert counting - drafts | {"KimiK25ForConditionalGeneration"} >= COUNTS_INPUTS
    assert {
        name for name in counting - drafts if name.startswith(("Deepseek", "Glm4MoeLite", "GlmMoe", "Mistral"))
    } <= (COUNTS_INPUTS)

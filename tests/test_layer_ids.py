"""An exported draft tells SGLang and vLLM the layers that it has learnt from, whatever each counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specbatch.drafts.eagle3.hf_config import hf_config
from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.eagle3.published import _layers
from specbatch.export.card import model_card
from specbatch.target import TargetShape, read_target
from tests.tiny_target import make_tiny_target

SHAPE = Shape(64, 128, 4, 2, 16, 512, 512, 3, False, True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TargetShape:
    folder: Path = make_tiny_target(tmp_path_factory.mktemp("target") / "tiny")
    return read_target(str(folder))


@pytest.mark.parametrize(
    ("architecture", "outputs", "sglang"),
    [
        ("LlamaForCausalLM", (2, 30, 57), [2, 30, 57]),
        ("DeepseekV3ForCausalLM", (2, 30, 57), [3, 31, 58]),
        ("DeepseekV3ForCausalLM", (1, 29, 57), [1, 29, 57]),
    ],
)
def test_both_engines_are_told_ids_that_mean_these_outputs(
    tiny: TargetShape, architecture: str, outputs: tuple[int, ...], sglang: list[int]
) -> None:
    target = replace(tiny, architecture=architecture)
    made = hf_config(target, SHAPE, target_name="t", aux_layers=outputs, draft_vocab=512, draft_tokens=3)
    assert made["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == sglang
    assert made["eagle_aux_hidden_state_layer_ids"] == [layer + 1 for layer in outputs], "vLLM's, of every target"
    assert _layers(made, made["eagle_config"], architecture) == list(outputs), "and read back"


def test_the_card_says_where_sglang_needs_specbatch() -> None:
    about = {
        "target": "google/gemma-3-4b-it", "algorithm": "eagle3", "title": "EAGLE-3", "specbatch": "1", "run": "r",
        "step": 1, "target_fingerprint": "f", "training_accuracy": None, "serve": {}, "sglang_needs_specbatch": True,
    }  # fmt: skip
    assert "Install specbatch with SGLang" in model_card(about, {})
    assert "Install specbatch" not in model_card(about | {"sglang_needs_specbatch": False}, {})

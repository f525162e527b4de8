"""Recognizing the draft in a directory, and whether it fits a target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from specbatch.config import Config, Data, Evaluate, Run, Target
from specbatch.drafts.block.config import DFlashDraft
from specbatch.errors import UserError
from specbatch.evaluation.published import check_draft, config_of, kind_of
from specbatch.target import read_target

CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"], "vocab_size": 512, "draft_vocab_size": 128, "hidden_size": 64,
    "num_hidden_layers": 1, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]},
}  # fmt: skip


def write(folder: Path, width: int = 192, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file({"fc.weight": torch.zeros(64, width)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "eagle3"),
        ({"architectures": ["Eagle3LlamaForCausalLM"]}, "eagle3"),
        ({"architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3"}, "eagle3"),
        ({"architectures": ["DFlashDraftModel"]}, "dflash"),
        ({"architectures": ["Qwen3DSparkModel"]}, "dspark"),
    ],
)
def test_the_algorithm_is_told_by_architecture_or_form(tmp_path: Path, changes: dict[str, Any], kind: str):
    assert kind_of(tmp_path, CONFIG | changes) == kind


def test_another_algorithm_is_refused(tmp_path: Path):
    with pytest.raises(
        UserError,
        match=r"are LlamaForCausalLMEagle; drafts that can be measured are of the algorithms dflash, dspark, eagle3",
    ):
        kind_of(tmp_path, CONFIG | {"architectures": ["LlamaForCausalLMEagle"]})


def test_a_block_draft_is_what_its_files_say(tmp_path: Path):
    base = Config(run=Run(dir="out"), target=Target("t"), data=Data(train=["a"]), evaluate=Evaluate(prompts=3))
    own = {"mask_token_id": 7, "target_layer_ids": [1, 3]}
    found = CONFIG | {"architectures": ["DFlashDraftModel"], "block_size": 8, "dflash_config": own}
    config = config_of(tmp_path, found | {"eagle_config": None}, base)
    assert config.draft == DFlashDraft(
        init_from=str(tmp_path), num_layers=1, block_size=8, mask_token_id=7, aux_layers=[1, 3]
    )
    assert config.evaluate.prompts == 3
    # EAGLE-3 may count layers otherwise, and a chain is as long as one asks for.
    assert config_of(tmp_path, CONFIG, base).draft.aux_layers is None


@pytest.mark.parametrize(
    ("changes", "width", "told"),
    [
        ({"vocab_size": 511}, 192, "vocab_size is 511, but the target .* has 512: it is a draft for another target"),
        ({"hidden_size": 32}, 192, "target_hidden_size is 32, but the target .* has 64"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 14, 26]}}, 192, "reads the outputs of layers 1, 14"),
        ({}, 200, "fc.weight reads 200 values, which is not a multiple of the target's hidden size 64"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, tiny_target: Path, changes: dict[str, Any], width: int, told: str
):
    with pytest.raises(UserError, match=told):
        check_draft(write(tmp_path / "draft", width, **changes), read_target(tiny_target))


def test_what_fits_is_taken_in_each_form(tmp_path: Path, tiny_target: Path):
    shape = read_target(tiny_target)
    assert check_draft(write(tmp_path / "draft"), shape) == CONFIG
    speculators = {key: value for key, value in CONFIG.items() if key not in ("vocab_size", "hidden_size")}
    speculators["transformer_layer_config"] = {"vocab_size": 512, "hidden_size": 64}
    folder = write(tmp_path / "other")
    (folder / "config.json").write_text(json.dumps(speculators))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    check_draft(folder, shape)

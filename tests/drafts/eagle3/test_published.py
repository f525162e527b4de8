"""A draft that is there already as the start of training: what fits, what does not, and what becomes of its words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specbatch.config import Config, Data, Run, Target
from specbatch.drafts.base import algorithm_of
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.drafts.eagle3.published import PublishedEagle3, starting_tensors
from specbatch.errors import UserError
from specbatch.export import export
from specbatch.target import TargetShape, lm_head, read_target
from tests.test_export import make_run, random_draft

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Changed = Callable[..., Path]


@pytest.fixture
def exported(tmp_path: Path, tiny_target: Path) -> Path:
    """An exported draft with a vocabulary of 100 tokens and an MLP 96 wide."""
    return export(make_run(tmp_path / "run", tiny_target))


@pytest.fixture
def changed(exported: Path, tmp_path: Path) -> Changed:
    """The draft with other tensors or other settings; None removes one."""

    def make(tensors: dict[str, torch.Tensor | None] | None = None, **settings: object) -> Path:
        folder = tmp_path / "other"
        folder.mkdir()
        stored = {**load_file(exported / "model.safetensors"), **(tensors or {})}
        save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / "model.safetensors")
        found = {**json.loads((exported / "config.json").read_text()), **settings}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
        return folder

    return make


def config_for(target: Path, draft: Path, **changes: object) -> Config:
    settings = Eagle3Draft(init_from=str(draft), vocab_size=100, intermediate_size=96)
    return Config(
        run=Run(dir="run"),
        target=Target(path=str(target)),
        data=Data(train=["conversations.jsonl"]),
        draft=replace(settings, **changes),
    )


def read_published(config: Config, target: TargetShape) -> PublishedEagle3:
    return algorithm_of(config, target).files.read_published()


def refused(target: Path, draft: Path, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        read_published(config_for(target, draft, **changes), read_target(target))
    assert str(caught.value).startswith("draft.init_from: ")
    return str(caught.value)


def test_an_export_is_the_start_of_another_training_tensor_by_tensor(exported: Path, tiny_target: Path):
    target = read_target(tiny_target)
    published = read_published(config_for(tiny_target, exported), target)
    assert published.warnings == ()
    draft = random_draft(target, 100, seed=3)
    ids = draft.pop("draft_ids")
    assert published.ids.tolist() == ids.tolist()
    tensors = starting_tensors(published, tuple(ids.tolist()), lm_head(target))
    assert tensors.keys() == draft.keys()
    for name, tensor in draft.items():
        assert torch.equal(tensors[name].float(), tensor.bfloat16().float()), name


def test_another_vocabulary_keeps_the_rows_of_tokens_that_both_have(exported: Path, tiny_target: Path):
    target = read_target(tiny_target)
    published = read_published(config_for(tiny_target, exported), target)
    row_of = {int(token): row for row, token in enumerate(published.ids)}
    wanted = tuple(range(0, 512, 3))
    assert 0 < len(row_of.keys() & set(wanted)) < len(wanted)
    head = starting_tensors(published, wanted, lm_head(target))["lm_head.weight"]
    old, of_target = load_file(exported / "model.safetensors")["lm_head.weight"], lm_head(target)
    for row, token in enumerate(wanted):
        expected = old[row_of[token]] if token in row_of else of_target[token]
        assert torch.equal(head[row], expected.float())


def test_names_of_other_publishers_are_understood(exported: Path, changed: Changed, tiny_target: Path):
    stored = load_file(exported / "model.safetensors")
    renamed: dict[str, torch.Tensor | None] = dict.fromkeys(stored)
    for name, tensor in stored.items():
        kept = name in ("lm_head.weight", "d2t", "t2d")
        renamed[name if kept else f"model.{name.replace('layers.0.', 'midlayer.')}"] = tensor
    folder = changed(renamed, eagle_config=None)
    published = read_published(config_for(tiny_target, folder), read_target(tiny_target))
    assert published.names["layers.0.mlp.up_proj.weight"] == "model.midlayer.mlp.up_proj.weight"


def test_a_draft_with_the_norms_of_eagle_3_1_is_the_start_of_another_one(
    changed: Changed, exported: Path, tiny_target: Path
):
    assert "does not say fc_norm: true; set draft.fc_norm: false" in refused(tiny_target, exported, fc_norm=True)
    older = {f"aux_norm_{name}.weight": torch.full((64,), n + 0.5) for n, name in enumerate(("low", "mid", "high"))}
    folder = changed(older, use_aux_norm=True, norm_output=True)
    target = read_target(tiny_target)
    published = read_published(config_for(tiny_target, folder, fc_norm=True, norm_output=True), target)
    tensors = starting_tensors(published, tuple(range(100)), lm_head(target))
    assert [tensors[f"fc_norm.{number}.weight"][0].item() for number in range(3)] == [0.5, 1.5, 2.5]


def test_facts_say_the_norms_of_eagle_3_1_only_of_drafts_that_have_them(exported: Path, tiny_target: Path):
    """Snapshots from before these switches existed can still be continued."""
    config, target = config_for(tiny_target, exported), read_target(tiny_target)
    plain = algorithm_of(config, target).facts()
    normed = algorithm_of(replace(config, draft=replace(config.draft, fc_norm=True)), target).facts()
    assert normed == {**plain, "fc_norm": True}
    assert "fc_norm" not in plain


def test_the_norms_of_layers_and_a_trained_embedding_exclude_each_other(exported: Path, tiny_target: Path):
    config = config_for(tiny_target, exported, fc_norm=True, train_embedding=True)
    with pytest.raises(UserError, match=r"draft\.fc_norm: true: SGLang keeps a trained embedding only"):
        algorithm_of(config, read_target(tiny_target)).check()


def test_an_embedding_of_its_own_is_taken_or_warned_of(changed: Changed, tiny_target: Path):
    folder = changed({"embed_tokens.weight": torch.ones(512, 64)})
    target = read_target(tiny_target)
    (warning,) = read_published(config_for(tiny_target, folder), target).warnings
    assert "set draft.train_embedding: true" in warning
    taken = read_published(config_for(tiny_target, folder, train_embedding=True), target)
    assert taken.names["embed_tokens.weight"] == "embed_tokens.weight"
    assert taken.warnings == ()


def test_a_head_of_the_whole_vocabulary_needs_no_map(tmp_path: Path, tiny_target: Path):
    folder = export(make_run(tmp_path / "run", tiny_target, vocab=None))
    published = read_published(config_for(tiny_target, folder), read_target(tiny_target))
    assert np.array_equal(published.ids, np.arange(512))


def test_what_does_not_fit_is_refused_with_what_to_do(tiny_target: Path, exported: Path):
    assert "set draft.intermediate_size: 96" in refused(tiny_target, exported, intermediate_size=None)
    message = refused(tiny_target, exported, aux_layers=[0, 1, 4])
    assert "reads the outputs of the target's layers [0, 2, 4], and this run captures [0, 1, 4]" in message
    assert message.endswith("set draft.aux_layers: [0, 2, 4]")
    assert "there is no directory" in refused(tiny_target, exported / "none")


@pytest.mark.parametrize(
    ("tensors", "settings", "words"),
    [
        ({"fc.weight": None}, {}, "has no tensor fc.weight"),
        ({"fc_norm.0.weight": torch.ones(64)}, {}, "has a tensor fc_norm.0.weight"),
        ({"fc.weight": torch.ones(64, 64)}, {}, r"fc.weight in .* is \[64, 64\], and this run's is \[64, 192\]"),
        ({"d2t": None, "t2d": None}, {}, "has no d2t, and its head has 100 rows for 512 tokens"),
        ({"d2t": torch.zeros(99, dtype=torch.int64)}, {}, r"d2t in .* is \[99\]"),
        ({"d2t": torch.full((100,), 500)}, {}, "does not give 100 different tokens"),
        ({"t2d": torch.zeros(512, dtype=torch.bool)}, {}, "do not name the same tokens"),
        ({"model.fc.weight": torch.ones(64, 192)}, {}, "has both"),
        ({}, {"vocab_size": 500}, "is a draft for another target: its vocab_size is 500"),
        ({}, {"norm_output": True}, "says norm_output: true; set draft.norm_output: true"),
        ({}, {"use_aux_norm": True}, "says use_aux_norm: true; set draft.fc_norm: true"),
        ({}, {"norm_before_fc": True}, "says norm_before_fc: true, which specbatch's EAGLE-3 does not support"),
    ],
)
def test_a_draft_of_another_kind_is_refused(changed: Changed, tiny_target: Path, tensors, settings, words):
    assert re.search(words, refused(tiny_target, changed(tensors, **settings)))


def test_pickles_are_not_read_but_told_how_to_convert(tmp_path: Path, tiny_target: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "convert its pytorch_model.bin: python -c" in refused(tiny_target, tmp_path)


def test_other_positions_and_other_weights_are_warned_of(changed: Changed, exported: Path, tiny_target: Path):
    folder = changed(rope_theta=5e5, rope_parameters=None, transformer_layer_config=None)
    about = json.loads((exported / "specbatch.json").read_text())
    (folder / "specbatch.json").write_text(json.dumps(about | {"target_fingerprint": "0" * 16}))
    positions, weights = read_published(config_for(tiny_target, folder), read_target(tiny_target)).warnings
    assert "was trained with rope_theta 500000" in positions
    assert "was trained for other weights" in weights

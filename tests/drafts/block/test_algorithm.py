"""DFlash and DSpark as the rest of specbatch sees them: counts, costs, checks, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from specbatch.config import Config, Data, Run, Target
from specbatch.drafts.base import Algorithm
from specbatch.drafts.block.algorithm import DFlash, DSpark
from specbatch.drafts.block.blocks import lay_out
from specbatch.drafts.block.config import DFlashDraft, DSparkDraft
from specbatch.drafts.block.files import shapes
from specbatch.drafts.eagle3.algorithm import Eagle3
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.drafts.masks import Masks, SampleId
from specbatch.errors import RunError, UserError
from specbatch.target import read_target

FREE = 400
"""A token of the tiny target that the checks have nothing against."""


def make(tiny_target: Path, name: str = "dflash", **changes: object) -> Algorithm:
    kind, section = {"dflash": (DFlash, DFlashDraft), "dspark": (DSpark, DSparkDraft)}[name]
    draft = section(**{"num_layers": 2, "block_size": 4, "mask_token_id": FREE, **changes})
    config = Config(
        run=Run(dir="run", seed=5), target=Target(path=str(tiny_target)), data=Data(train=["a.jsonl"]), draft=draft
    )
    return kind(config, read_target(tiny_target))


def some_masks() -> Masks:
    draw = np.random.default_rng(0)
    masks = [np.repeat(draw.random(9) < 0.5, draw.integers(1, 9, 9)) for _ in range(12)]
    return Masks.of(masks, [SampleId(1, index) for index in range(12)])


@pytest.mark.parametrize("name", ["dflash", "dspark"])
@pytest.mark.parametrize("most", [None, 3])
def test_counts_and_costs_are_what_a_pack_of_these_samples_has(tiny_target, name, most):
    algorithm, masks = make(tiny_target, name, anchors=most), some_masks()
    layout = lay_out(
        torch.from_numpy(masks.mask_N), tuple(masks.lengths_S.tolist()), tuple(masks.samples), algorithm.draw,
        algorithm.proposals,
    )  # fmt: skip
    counts, costs = algorithm.counts(masks), algorithm.costs(masks)
    learns = (layout.target_KA >= 0).sum(1).tolist()
    assert counts.sum(1).tolist() == learns * (len(algorithm.terms) // len(learns))
    assert (costs.counts_TS == counts).all()
    assert costs.computed_TS[0].sum() == len(layout.row_A)
    rows = layout.rows(SimpleNamespace(rank=0, ranks=1))
    assert {key: int(value.sum()) for key, value in costs.rows_S.items()} == {k: len(r) for k, r in rows.items()}
    for index, (start, length) in enumerate(zip(masks.starts_S, masks.lengths_S, strict=True)):
        wanted = algorithm.contract.rows(masks.mask_N[start : start + length])
        last_read = max([*wanted["aux"].tolist(), *wanted["last"].tolist()], default=-1)
        assert costs.captured_S[index] == last_read + 1
        assert algorithm.teaches(masks.mask_N[start : start + length]) == (last_read >= 0)
    assert (costs.flops_S >= costs.forward_flops_S).all()


def test_weights_of_slots_fall_as_the_papers_say_and_add_up_to_one(tiny_target):
    counts = np.array([10, 8, 5])
    shares = make(tiny_target, position_decay=2.0).shares(counts)
    np.testing.assert_allclose(shares / counts, (shares / counts)[0] * np.exp(-np.arange(3) / 2))
    assert shares.sum() == pytest.approx(1)
    paced = make(tiny_target, d_pace=True).shares(counts)
    np.testing.assert_allclose(paced / counts, [1 / 23] * 3)
    spark = make(tiny_target, "dspark", block_size=3).shares(np.array([10, 8, 5] * 2))
    np.testing.assert_allclose(spark[:3], spark[3:])
    assert spark[:3].sum() == pytest.approx(1)
    assert not make(tiny_target).shares(np.zeros(3, dtype=np.int64)).any()


def test_terms_say_which_proposed_token_they_are_about(tiny_target):
    assert [(term.name, term.position) for term in make(tiny_target).terms] == [
        ("slot 1", 0), ("slot 2", 1), ("slot 3", 2),
    ]  # fmt: skip
    spark = make(tiny_target, "dspark", block_size=2)
    assert [term.name for term in spark.terms] == ["slot 0", "slot 1", "confidence 0", "confidence 1"]
    assert spark.proposals == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask_token_id": None}, "draft.mask_token_id: DFlash needs a token for empty slots"),
        ({"mask_token_id": 512}, "draft.mask_token_id: 512 is not one of the target's 512 tokens"),
        ({"mask_token_id": 2}, "draft.mask_token_id: 2 ends an answer"),
        ({"aux_layers": [3, 1]}, r"draft.aux_layers: \[3, 1\]: DFlash reads distinct layers in ascending order"),
        ({"aux_layers": [1, 5]}, "draft.aux_layers: 5 can't be read: of the target's 6 layers"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_starts(tiny_target, changes, said):
    make(tiny_target).check()
    with pytest.raises(UserError, match=said):
        make(tiny_target, **changes).check()


def corpus(masks: list[list[bool]], ids: list[int] | None = None) -> SimpleNamespace:
    """The part of a corpus that the checks use."""
    mask = np.array([m for each in masks for m in each])
    ids = ids or [7] * len(mask)
    counts = np.bincount(np.array(ids)[mask], minlength=512)
    starts = np.cumsum([0, *map(len, masks)])
    rows = [ids[starts[i] : starts[i + 1]] for i in range(len(masks))]
    return SimpleNamespace(
        __len__=lambda: len(masks),
        loss_token_counts=counts,
        masks=lambda: iter([Masks(mask, np.diff(starts))]),
        first_with=lambda token: next((i for i, row in enumerate(rows) if token in row), None),
        place=lambda i: f"a.jsonl:{i + 1}",
    )


class SmallCorpus:
    """A corpus like `corpus`, with a length."""

    def __init__(self, *args: object) -> None:
        self.__dict__.update(corpus(*args).__dict__)

    def __len__(self) -> int:
        return self.__dict__["__len__"]()


def test_what_does_not_fit_the_corpus_is_refused_and_a_small_one_gets_a_hint(tiny_target):
    answers = [[False, False, True, True, True, True], [False, True]]
    algorithm = make(tiny_target)
    assert "below 1000000 eagle3 accepts more" in algorithm.check_corpus(SmallCorpus(answers))[0]
    with pytest.raises(UserError, match=r"draft.mask_token_id: 400 occurs in the corpus \(a.jsonl:2\)"):
        algorithm.check_corpus(SmallCorpus(answers, [7] * 6 + [FREE, 7]))
    with pytest.raises(UserError, match=r"draft.block_size: 5: every answer of the corpus has at most 4 tokens"):
        make(tiny_target, block_size=5).check_corpus(SmallCorpus(answers))


@pytest.mark.parametrize("name", ["dflash", "dspark"])
def test_a_module_has_the_tensors_of_a_checkpoint(tiny_target, name):
    algorithm = make(tiny_target, name)
    module = algorithm.module()(algorithm.settings(None))
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == shapes(algorithm.shape)
    assert sum(p.numel() for p in module.parameters()) == algorithm.shape.parameters
    assert dict(module.state_dict()).keys() == shapes(algorithm.shape).keys()


def written(folder: Path, algorithm: Algorithm) -> Path:
    """A checkpoint of a random draft."""
    generator = torch.Generator().manual_seed(1)
    stored = {n: torch.randn(size, generator=generator) for n, size in shapes(algorithm.shape).items()}
    tensors = algorithm.files.checkpoint(stored, "here")
    config = algorithm.files.hf_config(tensors, target_name="target", draft_tokens=3)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["dflash", "dspark"])
def test_a_run_starts_from_what_another_exported(tiny_target, tmp_path, name):
    folder = written(tmp_path / "draft", make(tiny_target, name))
    files = make(tiny_target, name, init_from=str(folder)).files
    published = files.read_published()
    assert not published.warnings
    assert files.starting_tensors(published, None, None).keys() == shapes(files.shape).keys()
    other = make(tiny_target, name, init_from=str(folder), block_size=6).files.read_published()
    assert "was trained with blocks of 4" in other.warnings[0]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("dspark", {}, "is a DFlashDraftModel, and draft.algorithm: dspark starts from a Qwen3DSparkModel"),
        ("dflash", {"num_layers": 3, "aux_layers": [1, 3]}, "set draft.num_layers: 2"),
        ("dflash", {"aux_layers": [1, 2]}, r"set draft.aux_layers: \[1, 3\]"),
        ("dflash", {"mask_token_id": 9}, "set draft.mask_token_id: 400"),
        ("dflash", {"intermediate_size": 64}, "set draft.intermediate_size: 128"),
    ],
)
def test_a_draft_of_another_kind_or_shape_is_refused(tiny_target, tmp_path, name, changes, said):
    folder = written(tmp_path / "draft", make(tiny_target))
    with pytest.raises(UserError, match=said):
        make(tiny_target, name, init_from=str(folder), **changes).files.read_published()


def test_a_block_draft_is_none_that_eagle3_starts_from(tiny_target, tmp_path):
    folder = written(tmp_path / "draft", make(tiny_target))
    config = replace(make(tiny_target).config, draft=Eagle3Draft(init_from=str(folder), vocab_size=256))
    with pytest.raises(UserError, match=r"init_from: .* is not an EAGLE-3 draft"):
        Eagle3(config, read_target(tiny_target)).files.read_published()


def test_a_checkpoint_says_what_engines_read(tiny_target):
    flash = make(tiny_target).files
    config = flash.hf_config({}, target_name="target", draft_tokens=3)
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == {"mask_token_id": FREE, "target_layer_ids": [1, 3]}
    assert (config["block_size"], config["is_causal"], config["sample_from_anchor"]) == (4, False, False)
    spark = make(tiny_target, "dspark").files.hf_config({}, target_name="target", draft_tokens=4)
    assert spark["architectures"] == ["Qwen3DSparkModel"]
    assert (spark["target_layer_ids"], spark["markov_rank"], spark["sample_from_anchor"]) == ([1, 3], 256, True)
    assert flash.serve("sglang", 3) == {"speculative_algorithm": "DFLASH"}
    assert flash.serve("sglang", 2) == {"speculative_algorithm": "DFLASH", "speculative_dflash_block_size": 3}
    served = make(tiny_target, "dspark").files.serve
    assert served("sglang", 4) == {"speculative_algorithm": "DSPARK"}
    assert served("sglang", 3) == {"speculative_algorithm": "DSPARK", "speculative_dspark_block_size": 3}
    assert flash.serve("vllm", 3) == {"method": "dflash", "num_speculative_tokens": 3}
    assert flash.serve("another", 3) is None


def test_a_snapshot_that_lacks_a_tensor_is_no_checkpoint(tiny_target):
    files = make(tiny_target).files
    stored = {name: torch.zeros(size) for name, size in shapes(files.shape).items()}
    del stored["fc.weight"]
    with pytest.raises(RunError, match=r"here: the draft has no tensor fc.weight"):
        files.checkpoint(stored, "here")
    wider = replace(files.shape, intermediate=7)
    with pytest.raises(RunError, match=r"gate_proj.weight is \[128, 64\], not \[7, 64\]"):
        replace(files, shape=wider).checkpoint(stored | {"fc.weight": torch.zeros(64, 128)}, "here")

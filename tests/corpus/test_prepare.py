"""Preparation from files to what a run reads: nothing is lost without a reason, nothing is done twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from specbatch.corpus import Corpus, corpus_of, prepare
from specbatch.corpus.tokenizer import load_tokenizer
from specbatch.errors import UserError
from tests.corpus import templates
from tests.corpus.rows import A1, Settings, lines
from tests.corpus.templates import with_template
from tests.corpus.test_mask import talk


def test_data_are_prepared_once_until_anything_changes_that_the_result_depends_on(
    settings: Settings, target_copy: Path, tmp_path: Path
) -> None:
    config = settings({"a.jsonl": lines(talk("Hi", "Hello."), A1)}, target=target_copy)
    first = prepare(config)
    assert not first.cached
    config.data.workers, config.data.max_bad_fraction = 3, 0.5
    again = prepare(config)
    assert again.cached
    assert again.train == first.train
    assert "prepared before" in again.text()
    seen = {first.train.path}

    def prepared_anew() -> bool:
        path = prepare(config).train.path
        known = path in seen
        seen.add(path)
        return not known

    config.data.max_tokens = 100
    assert prepared_anew()
    config.data.loss_on = "last"
    assert prepared_anew()
    config.data.template_variables = {"enable_thinking": False}
    assert prepared_anew()
    with_template(target_copy, templates.MARKED)
    assert prepared_anew()
    tokenizer = json.loads((target_copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = True
    (target_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert prepared_anew()
    (tmp_path / "a.jsonl").write_bytes(lines(talk("Hi", "Hellö.")))
    assert prepared_anew()
    assert not prepared_anew()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_summary_says_what_came_of_the_data(settings: Settings) -> None:
    text = prepare(settings({"a.jsonl": lines(A1, talk("Hi", "Hello."))})).text()
    assert text.startswith("training data: 2 samples of 2 rows, ")
    assert "median" in text
    assert "prepared in " in text


@pytest.mark.light
def test_the_quickstarts_target_gives_every_answer_and_its_end(smollm: Path, settings: Settings) -> None:
    config = settings({"a.jsonl": lines(talk("Who are you?", "I am SmolLM.", "Sure?", "Yes."))}, target=smollm)
    corpus: Corpus = corpus_of(prepare(config))
    tokenizer, sample = load_tokenizer(config), corpus.sample(0)
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "I am SmolLM.<|im_end|>Yes.<|im_end|>"
    assert tokenizer.decode(sample.input_ids).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert corpus.tokenizer_size == 49152


def test_samples_that_repeat_are_counted_and_left_out_if_asked(settings: Settings) -> None:
    one, two = talk("Hi", "Hello."), talk("Why?", "So.")
    files = {"a.jsonl": lines(one, two, one), "b.jsonl": lines(two, talk("And?", "Or."))}
    kept = prepare(settings(files))
    assert kept.train.samples == 5
    assert "2 samples repeat an earlier one (first: " in kept.text()
    assert "a.jsonl:3); kept" in kept.text()
    dropped = prepare(settings(files, duplicates="drop"))
    corpus, every = corpus_of(dropped), corpus_of(kept)
    assert "2 samples repeat an earlier one" in dropped.text()
    assert [corpus.place(i).rpartition("/")[2] for i in range(3)] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:2"]
    assert [len(corpus.sample(i).input_ids) for i in range(3)] == corpus.lengths.tolist()
    assert dropped.train.tokens == corpus.lengths.sum()
    assert corpus.entry_sizes == [2, 1]
    assert every.entry_sizes == [3, 2]
    masks = [corpus.sample(i).loss_mask for i in range(3)]
    assert dropped.train.loss_tokens == sum(int(mask.sum()) for mask in masks) == corpus.loss_token_counts.sum()
    assert corpus.fingerprint != every.fingerprint
    only = int(
        np.setdiff1d(corpus.sample(2).input_ids, np.concatenate([corpus.sample(i).input_ids for i in (0, 1)]))[0]
    )
    assert (corpus.first_with(only), every.first_with(only), every.first_with(-1)) == (2, 4, None)


def test_held_out_samples_that_are_trained_on_are_counted_by_content(settings: Settings) -> None:
    one, two = talk("Hi", "Hello."), talk("Why?", "So.")
    files = {"a.jsonl": lines(one, talk("And?", "Or.")), "h.jsonl": lines(two, {**one, "id": 7}, one)}
    summary = prepare(settings(files, heldout=("h.jsonl",)))
    assert (summary.shared, summary.first_shared.rpartition("/")[2]) == (2, "h.jsonl:2")
    assert "warning: 2 of 3 held-out samples equal a training sample" in summary.text()


def test_a_changed_file_costs_that_file_and_what_was_broken_off_is_gone_on_with(
    settings: Settings, tmp_path: Path
) -> None:
    files = {"a.jsonl": lines(talk("Hi", "Hello.")), "b.jsonl": lines(talk("Why?", "So."))}
    config = settings(files)
    first = prepare(config).train
    (tmp_path / "b.jsonl").write_bytes(lines(talk("Why?", "So."), talk("And?", "Or.")))
    second = prepare(config).train
    assert second.sources[0].path == first.sources[0].path
    assert second.sources[1].path != first.sources[1].path
    assert second.samples == 3
    assert prepare(config).cached


def test_a_transform_of_ones_own_filters_and_changes_rows_and_its_file_is_part_of_the_key(
    settings: Settings, tmp_path: Path
) -> None:
    code = "def mine(row):\n    return None if row['bad'] else {'messages': row['talk']}\n"
    (tmp_path / "mine.py").write_text(code)
    rows = [{"bad": bad, "talk": talk("Hi", "Hello.")["messages"]} for bad in (False, True)]
    config = settings({"a.jsonl": lines(*rows)}, transform=f"{tmp_path / 'mine.py'}:mine")
    summary = prepare(config)
    assert (summary.train.samples, summary.train.bad_rows) == (1, 0)
    assert "1 left out by data.transform" in summary.text()
    assert prepare(config).cached
    (tmp_path / "mine.py").write_text(code.replace("None if row['bad'] else ", ""))
    assert prepare(config).train.samples == 2
    (tmp_path / "mine.py").write_text("def mine(row):\n    return row['nothing']\n")
    with pytest.raises(UserError, match=r"2 data\.transform failed .*KeyError"):
        prepare(config)
    for name, why in (
        ("mine", "must be module:function"),
        ("nowhere:f", "ModuleNotFoundError"),
        ("json:nothing", "no"),
    ):
        config.data.transform = name
        with pytest.raises(UserError, match=rf"data\.transform: {name}.*{why}"):
            prepare(config)


def test_a_preparation_that_was_broken_off_goes_on_where_it_was(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [talk("Hi", f"Hello {i}.") for i in range(300)]
    files = {"a.jsonl": lines(*rows[:250]), "b.jsonl": lines(*rows[250:])}
    whole = corpus_of(prepare(settings(files, cache_dir=str(tmp_path / "other"))))
    monkeypatch.setattr(sys.modules["specbatch.corpus.prepare"], "KEEP_EVERY_S", 0.0)
    told: list[int] = []

    def broken_off(text: str, done: int, total: int) -> None:
        told.append(done)
        if done >= 128:
            raise KeyboardInterrupt

    config = settings(files)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, broken_off)
    again: list[int] = []
    corpus = corpus_of(prepare(config, lambda text, done, total: again.append(done)))
    assert told[-1] == 128
    assert min(done for done in again if done > 1) == 128 + 64
    assert corpus.fingerprint == whole.fingerprint
    assert corpus.loss_token_counts.tolist() == whole.loss_token_counts.tolist()
    assert [corpus.place(i).rpartition("/")[2] for i in (0, 249, 250)] == ["a.jsonl:1", "a.jsonl:250", "b.jsonl:1"]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]

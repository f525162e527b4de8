"""The prepared corpus as a run reads it: its samples, places, masks and held-out data."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from specbatch.corpus import attach, corpus_of, make_plan, open_corpus, planned_steps, prepare
from specbatch.corpus.tokenizer import load_tokenizer
from specbatch.errors import RunError
from specbatch.plan import HELD_OUT
from specbatch.rundir import RunDir
from tests.corpus.rows import A1, Settings, lines
from tests.corpus.test_mask import talk


def test_what_is_prepared_is_what_every_process_of_the_run_opens(settings: Settings, tmp_path: Path) -> None:
    config = settings(
        {"a.jsonl": lines(talk("Hi", "Hello."), A1), "h.jsonl": lines(talk("Why?", "So."))}, heldout=("h.jsonl",)
    )
    told: list[tuple[str, int, int]] = []
    summary = prepare(config, lambda *progress: told.append(progress))
    attach(RunDir(tmp_path / "run"), summary)
    corpus = open_corpus(RunDir(tmp_path / "run"))
    assert len(corpus) == 2
    assert told[-1] == ("preparing held-out data", 1, 1)
    samples = [corpus.sample(i) for i in range(2)]
    assert [s.input_ids.dtype for s in samples] == [np.int32, np.int32]
    assert [s.loss_mask.dtype for s in samples] == [bool, bool]
    assert [len(s.input_ids) for s in samples] == corpus.lengths.tolist()
    assert corpus.lengths.dtype == corpus.loss_token_counts.dtype == np.int64
    expected = np.bincount(np.concatenate([s.input_ids[s.loss_mask] for s in samples]), minlength=512)
    assert corpus.loss_token_counts.tolist() == expected.tolist()
    assert corpus.tokenizer_size == 512
    tokenizer = load_tokenizer(config)
    assert tokenizer.decode(samples[0].input_ids[samples[0].loss_mask]) == "Hello.<|im_end|>"
    assert corpus.place(1).endswith("a.jsonl:2")
    assert corpus.heldout is not None
    (prompt,) = corpus.heldout.prompts()
    assert tokenizer.decode(prompt).endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert corpus.sample(2).input_ids.tolist() == corpus.heldout.sample(0).input_ids.tolist()
    for i in (-1, 3):
        with pytest.raises(IndexError):
            corpus.sample(i)
    plan = make_plan(config, corpus)
    assert plan.steps == planned_steps(config, plan) == 1
    config.training.epochs, config.training.max_steps = 40, 2
    config.training.tokens_per_pack = int(corpus.lengths.max())
    assert planned_steps(config, make_plan(config, corpus)) == 2


def test_a_run_whose_prepared_data_are_gone_says_so(settings: Settings, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(RunError, match="never prepared"):
        open_corpus(run)
    summary = prepare(settings({"a.jsonl": lines(A1)}))
    attach(run, summary)
    (Path(summary.train.path) / "part.json").unlink()
    with pytest.raises(RunError, match="no longer exist"):
        open_corpus(run)


def test_held_out_data_may_be_prompts_without_answers(settings: Settings) -> None:
    files = {
        "a.jsonl": lines(A1),
        "h.jsonl": lines({"messages": [{"role": "user", "content": "Why?"}]}, {"text": "x y z"}, A1),
    }
    config = settings(files, heldout=("h.jsonl",))
    heldout = corpus_of(prepare(config)).heldout
    assert heldout is not None
    assert len(heldout) == 2
    assert len(heldout.prompts()) == 1


def test_masks_of_held_out_samples_stand_behind_the_others_where_asked_for(settings: Settings) -> None:
    config = settings(
        {"a.jsonl": lines(talk("Hi", "Hello.")), "h.jsonl": lines(talk("No", "Oh."))}, heldout=("h.jsonl",)
    )
    corpus = corpus_of(prepare(config))
    assert len(list(corpus.masks())) == 1
    own, heldout = corpus.masks(heldout=True)
    assert own.sample(0) == (0, 0)
    assert heldout.sample(0) == (HELD_OUT, 1)
    assert heldout.mask_N.tolist() == corpus.sample(1).loss_mask.tolist()


def test_a_corpus_of_many_files_holds_few_open(settings: Settings) -> None:
    count = 150
    config = settings({f"{i:03}.jsonl": lines(talk("Hi", f"Hello {i}.")) for i in range(count)})
    before = psutil.Process().num_fds()
    corpus = corpus_of(prepare(config))
    assert len(corpus) == count
    assert sum(corpus.sample(i).loss_mask.sum() for i in range(count)) == corpus.part.loss_tokens
    assert corpus.place(7).endswith("007.jsonl:1")
    assert psutil.Process().num_fds() - before <= 70


@pytest.mark.parametrize("duplicates", ["keep", "drop"])
def test_masks_come_in_pieces_and_are_those_of_the_samples(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, duplicates: str
) -> None:
    rows = [talk("Hi", f"Hello {i % 7}.", "And?", "Or " * (i % 5)) for i in range(40)]
    config = settings({"a.jsonl": lines(*rows[:25]), "b.jsonl": lines(*rows[25:])}, duplicates=duplicates)
    corpus = corpus_of(prepare(config))
    expected = [corpus.sample(i).loss_mask for i in range(len(corpus))]
    module = sys.modules["specbatch.corpus.prepared"]
    for spans, tokens in ((1 << 16, 1 << 22), (3, 1 << 22), (1 << 16, 200), (1, 1)):
        monkeypatch.setattr(module, "SPANS_AT_ONCE", spans)
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", tokens)
        pieces = list(corpus.masks())
        assert [piece.first.sample for piece in pieces] == [0, *np.cumsum([len(p.lengths_S) for p in pieces])[:-1]]
        assert np.concatenate([piece.mask_N for piece in pieces]).tolist() == np.concatenate(expected).tolist()
        assert np.concatenate([piece.lengths_S for piece in pieces]).tolist() == corpus.lengths.tolist()
        assert max(len(piece.lengths_S) for piece in pieces) > 5 or spans < 100 or tokens < 1000

"""Statistics of `specbatch data --stats`, compared with numbers computed by hand."""

from __future__ import annotations

import numpy as np

from specbatch.corpus import corpus_of, prepare
from specbatch.corpus.stats import coverage, fill, histogram, stats
from tests.corpus.rows import Settings, lines
from tests.corpus.test_mask import talk


def test_lengths_are_counted_in_classes_that_double() -> None:
    assert histogram(np.array([4, 5, 7, 8, 31])) == [(4, 7, 3), (8, 15, 1), (16, 31, 1)]


def test_the_share_of_loss_tokens_within_a_vocabulary_is_that_of_the_most_frequent() -> None:
    counts = np.array([1, 0, 6, 3])
    assert [coverage(counts, size) for size in (1, 2, 4, 9)] == [0.6, 0.9, 1.0, 1.0]
    assert coverage(np.zeros(3, dtype=int), 1) == 0.0


def test_packs_of_one_sample_each_are_as_full_as_these() -> None:
    assert fill(np.full(10, 6), 10, seed=0) == 0.6
    assert fill(np.full(10, 5), 10, seed=0) == 1.0


def test_sources_and_refused_rows_are_told(settings: Settings) -> None:
    unanswered = {"messages": [{"role": "user", "content": "Hi"}]}
    files = {"a.jsonl": lines(talk("Hi", "Hello."), unanswered), "b.jsonl": lines(talk("Why?", "So."))}
    config = settings(files, max_bad_fraction=0.5)
    said = stats(config, corpus_of(prepare(config)))
    assert "a.jsonl: 1 samples of 2 rows" in said
    assert "b.jsonl: 1 samples of 1 rows" in said
    assert "1 no assistant turn (first: " in said
    assert "training.tokens_per_pack: 4096 " in said
    assert "draft.vocab_size: null" in said

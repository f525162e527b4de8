from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbatch.corpus import draft_vocabulary


def test_the_most_frequent_tokens_are_kept_and_ties_go_to_the_lower_id() -> None:
    counts = np.array([5, 0, 7, 5, 1, 5])
    assert draft_vocabulary(counts, 3, 6).tolist() == [0, 2, 3]
    assert draft_vocabulary(counts, 4, 6).tolist() == [0, 2, 3, 5]


def test_a_corpus_of_few_tokens_is_filled_up_with_other_ids_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    counts = np.zeros(2000, dtype=np.int64)
    counts[100:120] = 3
    with caplog.at_level(logging.WARNING):
        found = draft_vocabulary(counts, 1000, 2000)
    assert len(set(found.tolist())) == 1000
    assert set(range(100, 120)) <= set(found.tolist())
    assert "filled_percent=98.0 coverage_percent=100.00" in caplog.text


def test_ids_that_only_pad_the_embedding_are_never_in_it() -> None:
    counts = np.arange(128)
    assert draft_vocabulary(counts, 64, 64).max() == 63


def test_another_size_gives_another_vocabulary() -> None:
    counts = np.arange(2048)
    assert [len(draft_vocabulary(counts, size, 2048)) for size in (512, 1024)] == [512, 1024]


@pytest.mark.parametrize("size", [0, 9])
def test_a_size_that_the_tokenizer_cannot_fill_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} is not in 1..8"):
        draft_vocabulary(np.ones(8, dtype=np.int64), size, 8)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60).flatmap(
        lambda c: st.tuples(st.just(c), st.integers(1, len(c)))
    )
)
def test_no_token_left_out_is_more_frequent_than_one_kept(case: tuple[list[int], int]) -> None:
    counts, size = case
    found = draft_vocabulary(np.array(counts), size, len(counts))
    assert found.dtype == np.int64
    assert found.tolist() == sorted(set(found.tolist()))
    assert len(found) == size
    left = [count for i, count in enumerate(counts) if i not in found]
    assert min(counts[i] for i in found) >= max(left, default=0)

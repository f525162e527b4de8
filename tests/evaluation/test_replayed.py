"""Drafting replayed on text, against decoding that is played token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbatch.evaluation.replayed import acceptance_length, accepted_counts, right_counts


def decode(text: list[int], mask: list[bool], proposals: dict[tuple[int, int], int], most: int) -> list[int]:
    """Speculative decoding of the answers of a text that the target wrote greedily; accepted proposals of each step."""
    accepted = []
    turns = [i for i in range(1, len(text)) if mask[i] and not (i > 1 and mask[i - 1])]
    for first in turns:
        end = first
        while end < len(text) and mask[end]:
            end += 1
        newest = first  # the prefill's
        while newest + 1 < end:
            right = 0
            while right < most and newest + 1 + right < end and proposals[newest, right] == text[newest + 1 + right]:
                right += 1
            accepted.append(right)
            newest += right + 1
    return accepted


@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_the_walk_accepts_what_decoding_would(tokens, most, seed):
    text, mask = [token for token, _ in tokens], [loss for _, loss in tokens]
    proposed = np.random.default_rng(seed).integers(0, 3, (most, len(text)))
    greedy = np.full(len(text), -1)
    for position in range(1, len(text) - 1):
        if mask[position + 1]:
            greedy[position] = text[position + 1]
    counts = accepted_counts(proposed, greedy, np.array(mask), most)
    table = {(i, k): int(proposed[k, i]) for k in range(most) for i in range(len(text))}
    expected = decode(text, mask, table, most)
    assert counts.tolist() == np.bincount(expected, minlength=most + 1).tolist()


def test_a_perfect_draft_reaches_the_most_there_is():
    text = np.arange(1, 14)
    mask = np.array([False] * 3 + [True] * 10)
    proposed = np.stack([np.append(text[1 + step :], [-1] * (1 + step)) for step in range(2)])
    counts = accepted_counts(proposed, np.append(text[1:], -1), mask, 2)
    assert counts.tolist() == [0, 0, 3]
    assert acceptance_length(counts) == 3.0


def test_a_proposal_is_right_where_it_is_the_targets_choice_and_not_counted_where_that_is_unknown():
    greedy = np.array([-1, 7, 8, 9, -1])
    proposed = np.array([[5, 7, 8, 1, 3], [8, 9, -1, 9, 9]])
    # The second proposal from position i is for the token after i + 1.
    assert right_counts(proposed, greedy).tolist() == [[2, 0], [3, 2]]


def test_a_draft_that_is_never_right_is_plain_decoding():
    mask = np.array([False, True, True, True])
    counts = accepted_counts(np.full((3, 4), -1), np.array([-1, 5, 5, -1]), mask, 3)
    assert counts.tolist() == [2, 0, 0, 0]
    assert acceptance_length(counts) == 1.0


def test_without_an_answer_of_two_tokens_nothing_is_known():
    assert acceptance_length(accepted_counts(np.zeros((1, 2)), np.zeros(2), np.array([False, True]), 1)) is None
    assert acceptance_length(np.array([1, 1])) == pytest.approx(1.5)

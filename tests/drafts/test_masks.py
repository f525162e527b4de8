"""Masks and runs of loss tokens say the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specbatch.corpus.stored import spans_of
from specbatch.drafts.masks import Masks, Runs, SampleId

MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=6)


@given(MASKS)
def test_runs_of_masks_are_those_of_each_and_make_the_masks_again(given_masks: list[list[bool]]) -> None:
    masks = [np.array(mask) for mask in given_masks]
    made = Masks.of(masks)
    spans = [spans_of(mask) for mask in masks]
    both = np.concatenate([np.empty((0, 2), np.int64), *spans])
    assert made.runs.first_R.tolist() == both[:, 0].tolist()
    assert made.runs.end_R.tolist() == both[:, 1].tolist()
    assert made.runs.ends_S.tolist() == np.cumsum([len(found) for found in spans]).tolist()
    again = Masks(Runs(both[:, 0], both[:, 1], made.runs.ends_S), made.lengths_S)
    for attribute in ("mask_N", "starts_S", "position_N", "left_N", "loss_tokens_S"):
        assert getattr(again, attribute).tolist() == getattr(made, attribute).tolist()
    assert made.loss_tokens_S.tolist() == made.total(made.mask_N).tolist()
    assert again.mask_N.dtype == bool


def test_samples_are_those_named_or_follow_the_first() -> None:
    masks = [np.array([True, True])] * 2
    assert Masks.of(masks).sample(1) == SampleId(0, 1)
    assert Masks.of(masks, [SampleId(3, 7), SampleId(3, 5)]).sample(1) == SampleId(3, 5)
    assert Masks(np.ones(4, bool), np.array([2, 2]), first=SampleId(-1, 40)).sample(1) == SampleId(-1, 41)

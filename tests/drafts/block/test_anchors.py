"""The positions of blocks, and the rows of a sample that they read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbatch.drafts.block.anchors import Draw, anchors, learning
from specbatch.drafts.block.contract import BlockContract, default_aux_layers
from specbatch.drafts.masks import Masks, SampleId
from specbatch.plan import HELD_OUT

MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=6)


def masks_of(masks: list[list[bool]], epoch: int = 0) -> Masks:
    ids = [SampleId(epoch, index) for index in range(len(masks))]
    return Masks.of([np.array(mask) for mask in masks], ids)


@given(MASKS, st.integers(1, 5))
def test_anchors_and_what_they_learn_are_what_the_rule_says(masks, proposals):
    known = masks_of(masks)
    found = anchors(known, Draw(0, None))
    learnt = learning(known, found, proposals)
    first = 0
    for mask in masks:
        for a in range(len(mask)):
            assert found[first + a] == (a >= 1 and a + 1 < len(mask) and mask[a] and mask[a + 1])
            for k in range(proposals):
                run = mask[a : a + 2 + k]
                assert learnt[k, first + a] == (found[first + a] and len(run) == 2 + k and all(run))
        first += len(mask)


@given(MASKS, st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_anchors_that_are_drawn_depend_on_nothing_but_seed_epoch_and_sample(masks, most, seed, epoch):
    draw = Draw(seed, most)
    together = anchors(masks_of(masks, epoch), draw)
    every = anchors(masks_of(masks, epoch), Draw(seed, None))
    first = 0
    for index, mask in enumerate(masks):
        own = slice(first, first + len(mask))
        alone = anchors(Masks.of([np.array(mask)], [SampleId(epoch, index)]), draw)
        assert alone.tolist() == together[own].tolist()
        assert not (alone & ~every[own]).any()
        assert alone.sum() == min(most, every[own].sum())
        first += len(mask)


def test_another_epoch_draws_others_and_all_are_drawn_alike():
    mask = [[False, *[True] * 101]]
    drawn = np.stack([anchors(masks_of(mask, epoch), Draw(1, 10)) for epoch in range(300)])
    assert (drawn[0] != drawn[1]).any()
    often = drawn.sum(0)[1:101]
    assert often.min() > 10
    assert often.max() < 60


def test_held_out_samples_have_every_anchor():
    mask = [[False, *[True] * 20]]
    assert anchors(masks_of(mask, HELD_OUT), Draw(0, 3)).sum() == 19


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 5))
def test_the_contract_names_exactly_the_rows_that_blocks_read(mask, proposals):
    rows = BlockContract((1, 3), 4).rows(np.array(mask))
    known = masks_of([mask])
    found = anchors(known, Draw(0, None))
    learnt = learning(known, found, proposals)
    read = {j for a in np.flatnonzero(found) for j in range(a)}
    labels = {a + k for k in range(proposals) for a in np.flatnonzero(learnt[k])}
    assert rows["aux"].tolist() == sorted(read)
    assert rows["last"].tolist() == sorted(labels)


@pytest.mark.parametrize(
    ("draft", "target", "layers"),
    [(5, 36, (1, 9, 17, 25, 33)), (5, 30, (1, 8, 14, 20, 27)), (1, 30, (15,)), (2, 30, (1, 27)), (5, 6, (1, 2, 3))],
)
def test_layers_are_those_that_the_authors_read(draft, target, layers):
    assert default_aux_layers(draft, target) == layers

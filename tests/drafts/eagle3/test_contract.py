from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbatch.drafts.eagle3.contract import Eagle3Contract, default_aux_layers
from specbatch.drafts.eagle3.cost import costs_of
from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.masks import Masks
from specbatch.pack_manifest import Chunk, Manifest, chunks_of, missing, object_key

CONTRACT = Eagle3Contract(aux_layers=(1, 2, 3), hidden=4)
SHAPE = Shape(hidden=4, intermediate=5, heads=2, kv_heads=1, head_dim=2, vocab=9, draft_vocab=7)


def test_rows_stop_where_the_target_would_lie_beyond_the_sample():
    rows = CONTRACT.rows(np.array([0, 0, 1, 1, 1, 1], dtype=bool))
    # Loss tokens 3..5 are told by the target's states at 2..4, which columns 1..3 learn at the first step; 2 is told
    # inside the prompt, where nothing is drafted.
    assert rows["last"].tolist() == [2, 3, 4]
    assert rows["aux"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mask", [[1], [1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]])
def test_a_sample_that_teaches_nothing_needs_no_rows(mask):
    rows = CONTRACT.rows(np.array(mask, dtype=bool))
    assert rows["aux"].size == rows["last"].size == 0
    assert CONTRACT.bytes(np.array(mask, dtype=bool)) == 0


def test_bytes_are_those_of_the_rows():
    mask = np.array([0, 0, 0, 1, 1, 0, 0], dtype=bool)
    assert CONTRACT.bytes(mask) == 2 * (3 * 3 * 4 + 4)


@pytest.mark.parametrize(("layers", "chosen"), [(30, (1, 14, 26)), (36, (1, 17, 32)), (6, (0, 2, 4)), (4, (0, 1, 2))])
def test_a_low_a_middle_and_a_high_layer_are_read(layers, chosen):
    assert default_aux_layers(layers) == chosen


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_shallow_target_is_refused(layers):
    with pytest.raises(ValueError, match="three distinct"):
        default_aux_layers(layers)


MANIFEST = Manifest(
    5, (0, 3), (Chunk(9, "aux", 0, 2, 48, "a"), Chunk(9, "last", 0, 1, 8, "b"), Chunk(9, "aux", 2, 1, 24, "c"))
)


def test_chunks_follow_each_other_and_have_keys_of_their_own():
    assert [c.first_token for c in chunks_of(MANIFEST, 9, "aux")] == [0, 2]
    keys = [object_key("r", 1, MANIFEST, c) for c in MANIFEST.chunks]
    assert keys == ["r/1/0.3/5/9/aux/0", "r/1/0.3/5/9/last/0", "r/1/0.3/5/9/aux/2"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([(9, "aux", 3), (9, "last", 1)], None),
        ([(9, "aux", 4), (9, "last", 1)], "3 of 4 rows of aux"),
        ([(9, "aux", 3)], "no tensor last"),
        ([(9, "aux", 3), (9, "last", 1), (8, "aux", 1)], "sample 8: 0 of 1"),
    ],
)
def test_a_manifest_says_what_it_lacks(rows, says):
    found = missing(MANIFEST, rows, CONTRACT.widths)
    assert found == says if says is None else says in found


def test_a_manifest_of_wrong_sizes_is_noticed():
    manifest = Manifest(5, (0, 3), (Chunk(9, "aux", 0, 3, 48, "a"),))
    assert "3 rows in 48 bytes" in missing(manifest, [(9, "aux", 3)], CONTRACT.widths)


@given(st.lists(st.booleans(), max_size=12))
def test_rows_are_the_loss_tokens_that_another_follows(mask: list[bool]) -> None:
    wanted = [i for i in range(1, len(mask) - 1) if mask[i] and mask[i + 1]]
    assert CONTRACT.rows(np.array(mask, dtype=bool))["last"].tolist() == wanted


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), max_size=5), st.integers(1, 4), st.booleans())
def test_the_bytes_of_many_samples_are_those_of_each(masks: list[list[bool]], ttt_steps: int, images: bool) -> None:
    contract = replace(CONTRACT, images=images)
    costs = costs_of(Masks.of([np.array(mask) for mask in masks]), ttt_steps, replace(SHAPE, images=images))
    assert costs.bytes_S(contract).tolist() == [contract.bytes(np.array(mask)) for mask in masks]


def test_with_images_each_column_reads_the_embedding_of_the_token_after_it() -> None:
    contract = replace(CONTRACT, images=True)
    rows = contract.rows(np.array([0, 0, 1, 1, 1, 1], dtype=bool))
    assert rows["embeds"].tolist() == [1, 2, 3, 4]
    assert contract.layers == (1, 2, 3)
    assert contract.aux_layers == (1, 2, 3)
    assert contract.widths == {"aux": 12, "last": 4, "embeds": 4}

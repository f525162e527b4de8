from __future__ import annotations

import numpy as np
import pytest

from specbatch.capture import CaptureContract, default_aux_layers
from specbatch.manifest import Chunk, Manifest, chunks_of, missing, object_key

CONTRACT = CaptureContract(aux_layers=(1, 2, 3), hidden=4)


def test_rows_stop_where_the_target_would_lie_beyond_the_sample():
    rows = CONTRACT.rows(np.array([0, 0, 1, 1, 1, 1], dtype=bool))
    # Loss tokens 2..5 are told by the target's states at 1..4, which columns 0..3 read at the first step.
    assert rows["last"].tolist() == [1, 2, 3, 4]
    assert rows["aux"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mask", [[1], [1, 1], [0, 0, 0], [1, 1, 0]])
def test_a_sample_that_teaches_nothing_needs_no_rows(mask):
    rows = CONTRACT.rows(np.array(mask, dtype=bool))
    assert rows["aux"].size == rows["last"].size == 0
    assert CONTRACT.bytes(np.array(mask, dtype=bool)) == 0


def test_bytes_are_those_of_the_rows():
    mask = np.array([0, 0, 0, 1, 1, 0, 0], dtype=bool)
    assert CONTRACT.bytes(mask) == 2 * (3 * 3 * 4 + 2 * 4)


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

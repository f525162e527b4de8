"""Orders say in few words which rows are wanted."""

from __future__ import annotations

from array import array
from itertools import pairwise

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specbatch.inference.capture_request import CaptureRequest, digest, new_capture_request, ranges, rows_between

POSITIONS = st.sets(st.integers(0, 200)).map(lambda found: np.array(sorted(found), dtype=np.int64))


@given(POSITIONS, st.integers(0, 200), st.integers(0, 200))
def test_chunks_together_hold_each_wanted_row_once(positions: np.ndarray, a: int, b: int) -> None:
    wanted = ranges(positions)
    cuts = [0, *sorted((a, b)), 201]
    found = [rows_between(wanted, start, stop) + start for start, stop in pairwise(cuts)]
    assert np.concatenate(found).tolist() == positions.tolist()


def test_a_span_of_any_length_is_one_range() -> None:
    assert ranges(np.arange(100_000)) == ((0, 100_000),)


@given(POSITIONS, POSITIONS)
def test_an_order_survives_json(aux: np.ndarray, last: np.ndarray) -> None:
    request = new_capture_request(3, (1, 2), 7, "10.0.0.1:1234", np.arange(202), {"aux": aux, "last": last})
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(request)), CaptureRequest) == request


def test_the_digest_is_of_the_tokens_whatever_holds_them() -> None:
    tokens = [1, 2, 300_000]
    assert digest(tokens) == digest(array("q", tokens)) == digest(np.array(tokens, dtype=np.int32))
    assert digest(tokens) != digest([1, 2]) != digest([0])

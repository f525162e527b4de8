"""Space in a ring never overlaps, and all of it comes back."""

from __future__ import annotations

import threading
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbatch.inference.ring_buffer import ALIGNMENT, RingBuffer


@given(st.integers(1, 40), st.lists(st.one_of(st.none(), st.integers(1, 20 * ALIGNMENT)), max_size=200))
def test_pieces_never_overlap_and_an_empty_ring_takes_anything_that_fits(blocks: int, moves: list[int | None]) -> None:
    ring = RingBuffer(blocks * ALIGNMENT)
    live: deque[tuple[int, int]] = deque()
    for size in moves:
        if size is None or size > ring.size:
            if live:
                ring.give_back()
                live.popleft()
            continue
        offset = ring.take(size)
        if offset is None:
            assert live
            continue
        assert offset % ALIGNMENT == 0
        assert offset + size <= ring.size
        assert all(offset + size <= other or other + length <= offset for other, length in live)
        live.append((offset, size))


def test_a_piece_larger_than_the_ring_is_an_error() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        RingBuffer(10).take(11)


def test_whoever_waits_gets_the_room_that_is_given_back() -> None:
    ring = RingBuffer(1024)
    assert ring.take(1024) == 0
    assert ring.take(1, timeout_s=0.01) is None
    threading.Timer(0.05, ring.give_back).start()
    assert ring.take(1024, timeout_s=10.0) == 0

"""Dividing rows among the threads that put them."""

from __future__ import annotations

from typing import Any

import pytest

from specbatch.inference.sender import PUT_THREADS, SHARE_BYTES, shares
from specbatch.pack_manifest import Chunk


def objects(*sizes: int) -> list[Any]:
    return [(None, Chunk(index, "aux", 0, 1, size, ""), index) for index, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([], 0),
        ([SHARE_BYTES // 2] * 2, 1),
        ([SHARE_BYTES] * 2, 2),
        ([SHARE_BYTES] * 40, PUT_THREADS),
        ([SHARE_BYTES * 8, 1, 1], 2),
    ],
)
def test_large_puts_are_shared_evenly_and_nothing_is_lost(sizes: list[int], parts: int) -> None:
    found = shares(objects(*sizes))
    assert len(found) == parts
    assert [item for part in found for item in part] == objects(*sizes)
    if len(sizes) == 40:
        assert {len(part) for part in found} == {10}

"""The layout of objects in memory."""

from __future__ import annotations

import pytest

from specbatch.pack_manifest import Chunk, Manifest
from specbatch.transfer.layout import Destination, reads

WIDTHS = {"aux": 6, "last": 2}


def chunk(sample: int, tensor: str, first: int, rows: int) -> Chunk:
    return Chunk(sample, tensor, first, rows, 2 * rows * WIDTHS[tensor], f"{sample}{tensor}{first}")


def lay(chunks: list[Chunk], destinations: list[Destination]):
    return reads("ab", 2, Manifest(7, (1, 5), tuple(chunks)), destinations, WIDTHS)


def test_chunks_follow_each_other_in_the_order_of_their_tokens():
    laid = lay(
        [chunk(3, "aux", 128, 10), chunk(3, "aux", 0, 128), chunk(3, "last", 128, 4)],
        [Destination(3, "aux", 138, 1000), Destination(3, "last", 4, 9000)],
    )
    assert [(read.key, read.pointer, read.bytes) for read in laid] == [
        ("ab/2/1.5/7/3/aux/0", 1000, 128 * 12),
        ("ab/2/1.5/7/3/aux/128", 1000 + 128 * 12, 10 * 12),
        ("ab/2/1.5/7/3/last/128", 9000, 4 * 4),
    ]
    assert laid[0].checksum == "3aux0"


def test_destinations_without_rows_need_no_object():
    assert lay([], [Destination(1, "aux", 0, 1000)]) == []


@pytest.mark.parametrize(
    ("chunks", "problem"),
    [
        ([], "sample 3: 0 of 138 rows of aux"),
        ([chunk(3, "aux", 0, 137)], "sample 3: 137 of 138 rows of aux"),
        ([chunk(3, "aux", 0, 139)], "sample 3: 139 of 138 rows of aux"),
        ([chunk(3, "aux", 0, 138), chunk(4, "aux", 0, 1)], "sample 4 has no tensor aux to store"),
        ([Chunk(3, "aux", 0, 138, 5, "")], "sample 3: aux has 138 rows in 5 bytes"),
        ([chunk(3, "aux", 0, 69), chunk(3, "aux", 0, 69)], "the manifest names an object twice"),
    ],
)
def test_a_manifest_that_lacks_something_is_said_to(chunks: list[Chunk], problem: str):
    assert lay(chunks, [Destination(3, "aux", 138, 1000)]) == problem


def test_objects_without_a_wanted_row_are_left_out_and_keep_their_place():
    chunks = [chunk(3, "aux", first, 10) for first in (0, 10, 20, 30)]
    laid = lay(chunks, [Destination(3, "aux", 40, 1000, wanted=((0, 3), (19, 21)))])
    assert [read.pointer for read in laid] == [1000, 1000 + 10 * 12, 1000 + 20 * 12]
    assert lay(chunks, [Destination(3, "aux", 40, 1000, wanted=())]) == []
    assert lay(chunks[:3], [Destination(3, "aux", 40, 1000, wanted=())]) == "sample 3: 30 of 40 rows of aux"

"""Maps objects to places in memory, from a manifest and the rows that are needed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specbatch.pack_manifest import Manifest, chunks_of, missing, object_key


@dataclass(frozen=True)
class Destination:
    """The place for the rows of one tensor of one sample: contiguous bfloat16."""

    sample: int
    tensor: str
    rows: int
    pointer: int
    """Address of ``rows * width * 2`` registered bytes."""
    wanted: tuple[tuple[int, int], ...] | None = None
    """First row and one past the last of each run of needed rows; None for all rows. Objects without any of them are
    not fetched, and their place stays untouched."""

    def wants(self, first: int, end: int) -> bool:
        """Return whether any of these rows is needed."""
        return self.wanted is None or any(first < b and a < end for a, b in self.wanted)


@dataclass(frozen=True)
class Read:
    """One object to fetch, with the length and checksum that it must have."""

    key: str
    pointer: int
    bytes: int
    checksum: str


def reads(
    run: str, attempt: int, manifest: Manifest, destinations: Sequence[Destination], widths: dict[str, int]
) -> list[Read] | str:
    """Place the chunks of each destination contiguously.

    Args:
        destinations: those of the whole pack; those without rows are ignored.
        widths: values per row of each tensor.

    Returns:
        the objects to get, or a description of what the manifest lacks.
    """
    wanted = [d for d in destinations if d.rows]
    if lacking := missing(manifest, [(d.sample, d.tensor, d.rows) for d in wanted], widths):
        return lacking
    laid: list[Read] = []
    keys: set[str] = set()
    for destination in wanted:
        pointer, row = destination.pointer, 0
        for chunk in chunks_of(manifest, destination.sample, destination.tensor):
            read = Read(object_key(run, attempt, manifest, chunk), pointer, chunk.bytes, chunk.checksum)
            if read.key in keys:
                return "the manifest names an object twice"
            keys.add(read.key)
            if destination.wants(row, row + chunk.rows):
                laid.append(read)
            pointer, row = pointer + chunk.bytes, row + chunk.rows
    return laid

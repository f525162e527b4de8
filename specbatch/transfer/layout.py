"""Which object goes where in memory: from a manifest and the rows that are wanted. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specbatch.manifest import Manifest, chunks_of, missing, object_key


@dataclass(frozen=True)
class Destination:
    """Where the rows of one tensor of one sample go: bfloat16, one after the other."""

    sample: int
    tensor: str
    rows: int
    pointer: int
    """Address of ``rows * width * 2`` registered bytes."""
    wanted: tuple[tuple[int, int], ...] | None = None
    """First and one past the last of each run of rows that is needed: objects without any of them are not fetched, and
    their place is left as it is. None: all rows."""

    def wants(self, first: int, end: int) -> bool:
        """Whether any of these rows is needed."""
        return self.wanted is None or any(first < b and a < end for a, b in self.wanted)


@dataclass(frozen=True)
class Read:
    """One object to get, and what it has to be."""

    key: str
    pointer: int
    bytes: int
    checksum: str


def reads(
    run: str, attempt: int, manifest: Manifest, destinations: Sequence[Destination], widths: dict[str, int]
) -> list[Read] | str:
    """Lay the chunks of each destination one after the other.

    Args:
        destinations: of the whole pack; those of no rows are ignored.
        widths: values a row of each tensor.

    Returns:
        the objects to get, or what the manifest lacks.
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

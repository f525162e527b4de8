"""Which object goes where in memory: from a manifest and the rows that are wanted. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specbatch.manifest import Manifest, chunks_of, missing, object_key


@dataclass(frozen=True)
class Destination:
    """Where all rows of one tensor of one sample go: bfloat16, one after the other."""

    sample: int
    tensor: str
    rows: int
    pointer: int
    """Address of ``rows * width * 2`` registered bytes."""


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
    for destination in wanted:
        pointer = destination.pointer
        for chunk in chunks_of(manifest, destination.sample, destination.tensor):
            laid.append(Read(object_key(run, attempt, manifest, chunk), pointer, chunk.bytes, chunk.checksum))
            pointer += chunk.bytes
    if len({read.key for read in laid}) != len(laid):
        return "the manifest names an object twice"
    return laid

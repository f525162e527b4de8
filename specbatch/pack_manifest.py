"""Places of the rows of a pack in the store: keys, chunks, lengths, checksums. Pure.

A sample is stored in as many chunks as its prefill had. Readers rely on the manifest alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

PackId = tuple[int, int]
"""Epoch and index of a pack in its epoch's order, both from 0."""


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Contiguous bfloat16 rows of one tensor of one sample: one object of the store."""

    sample: int
    """Index of the sample in the corpus."""
    tensor: str
    """``aux`` or ``last``."""
    first_token: int
    """Position in the sample of the first token of the prefill chunk that gave these rows."""
    rows: int
    bytes: int
    checksum: str
    """XXH3-128 of the bytes, seeded with the attempt's secret, in hexadecimal."""


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """All objects of a pack that one claim stored."""

    claim: int
    pack: PackId
    chunks: tuple[Chunk, ...]


def claim_prefix(run: str, attempt: int, pack: PackId, claim: int) -> str:
    """Prefix of the keys of all objects of a claim."""
    return f"{run}/{attempt}/{pack[0]}.{pack[1]}/{claim}/"


def object_key(run: str, attempt: int, manifest: Manifest, chunk: Chunk) -> str:
    """The key of a chunk's object in the store."""
    prefix = claim_prefix(run, attempt, manifest.pack, manifest.claim)
    return f"{prefix}{chunk.sample}/{chunk.tensor}/{chunk.first_token}"


def chunks_of(manifest: Manifest, sample: int, tensor: str) -> list[Chunk]:
    """Return the chunks of one tensor of one sample, in the order of their rows."""
    chosen = (c for c in manifest.chunks if c.sample == sample and c.tensor == tensor)
    return sorted(chosen, key=lambda chunk: chunk.first_token)


def missing(manifest: Manifest, rows: Iterable[tuple[int, str, int]], widths: dict[str, int]) -> str | None:
    """Say what a manifest lacks.

    Args:
        rows: sample, tensor and number of rows that have to be there.
        widths: values per row of each tensor.

    Returns:
        None if nothing is missing, else a sentence that names the first difference.
    """
    expected = {(sample, tensor): count for sample, tensor, count in rows}
    found = dict.fromkeys(expected, 0)
    for chunk in manifest.chunks:
        if (chunk.sample, chunk.tensor) not in found:
            return f"sample {chunk.sample} has no tensor {chunk.tensor} to store"
        if chunk.rows < 1 or chunk.bytes != 2 * chunk.rows * widths[chunk.tensor]:
            return f"sample {chunk.sample}: {chunk.tensor} has {chunk.rows} rows in {chunk.bytes} bytes"
        found[chunk.sample, chunk.tensor] += chunk.rows
    for (sample, tensor), count in expected.items():
        if found[sample, tensor] != count:
            return f"sample {sample}: {found[sample, tensor]} of {count} rows of {tensor}"
    return None

"""Fetches the rows of a pack from the store into given memory, and verifies that they are unchanged."""

from __future__ import annotations

from collections.abc import Sequence

from specbatch.pack_manifest import Manifest, object_key
from specbatch.transfer.layout import Destination, Read, reads
from specbatch.transfer.memory import checksum, memory
from specbatch.transfer.store import StoreClient

__all__ = ["Destination", "PackLost", "problems", "read_pack", "remove_pack"]


class PackLost(Exception):
    """A pack is missing in the store or differs from its manifest; it must be reported and computed again."""


def read_pack(
    client: StoreClient,
    run: str,
    attempt: int,
    manifest: Manifest,
    destinations: Sequence[Destination],
    *,
    widths: dict[str, int],
    seed: int,
) -> None:
    """Fill the destinations with the verified rows of a pack, or of those of its objects that are needed.

    Args:
        widths: values per row of each tensor (`CaptureContract.widths`).
        seed: ``checksum_seed`` of the rendezvous.

    Raises:
        PackLost: rows are missing, or their length or checksum differs from the manifest; the content of the memory is
            undefined then. An unreachable store raises it as well: the head handles that case.
    """
    laid = reads(run, attempt, manifest, destinations, widths)
    if isinstance(laid, str):
        raise PackLost(laid)
    if wrong := problems(client, laid, seed):
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise PackLost(wrong[0] + more)


def problems(client: StoreClient, laid: Sequence[Read], seed: int) -> list[str]:
    """Fetch objects into memory.

    Returns:
        a sentence for each object that is missing or changed; empty if there is none.
    """
    found: list[str] = []
    answers = client.get([read.key for read in laid], [read.pointer for read in laid], [read.bytes for read in laid])
    for read, problem in zip(laid, answers, strict=True):
        if problem is None and checksum(memory(read.pointer, read.bytes), seed) != read.checksum:
            problem = "its bytes are not those that were stored"
        if problem is not None:
            found.append(f"object {read.key}: {problem}")
    return found


def remove_pack(client: StoreClient, run: str, attempt: int, manifest: Manifest) -> None:
    """Remove the objects of a trained pack.

    Raises:
        StoreError: the store can't be reached.
    """
    client.remove([object_key(run, attempt, manifest, chunk) for chunk in manifest.chunks])

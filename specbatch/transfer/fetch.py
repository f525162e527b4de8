"""Get the rows of a pack from the store into given memory, and prove that they are what was stored."""

from __future__ import annotations

from collections.abc import Sequence

from specbatch.manifest import Manifest, object_key
from specbatch.transfer.layout import Destination, Read, reads
from specbatch.transfer.store import StoreClient, checksum, memory

__all__ = ["Destination", "Lost", "problems", "read_pack", "remove_pack"]


class Lost(Exception):
    """A pack is not in the store, or not what its manifest says: to be reported, and computed again."""


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
    """Fill the destinations with the rows of a pack, or with those of its objects that are wanted; verified.

    Args:
        widths: values a row of each tensor (`CaptureContract.widths`).
        seed: ``checksum_seed`` of the rendezvous.

    Raises:
        Lost: rows are missing, or have another length or checksum than the manifest says; what the memory
            holds then is undefined. An unreachable store is no other case: the head sees to that.
    """
    laid = reads(run, attempt, manifest, destinations, widths)
    if isinstance(laid, str):
        raise Lost(laid)
    if wrong := problems(client, laid, seed):
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Lost(wrong[0] + more)


def problems(client: StoreClient, laid: Sequence[Read], seed: int) -> list[str]:
    """Get objects into memory.

    Returns:
        a sentence for each that is not there or not what was stored; empty if all is well.
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
        StoreError: if the store can't be reached.
    """
    client.remove([object_key(run, attempt, manifest, chunk) for chunk in manifest.chunks])

"""Get the rows of a pack from the store into given memory, and prove that they are what was stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specbatch.manifest import Manifest
from specbatch.transfer.store import StoreClient


class Lost(Exception):
    """A pack is not in the store, or not what its manifest says: report it with `Client.lost`."""


@dataclass(frozen=True)
class Destination:
    """Where all rows of one tensor of one sample go: bfloat16, one after the other."""

    sample: int
    tensor: str
    rows: int
    pointer: int
    """Address of ``rows * width * 2`` registered bytes."""


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
    """Fill the destinations with the rows of a pack, verified.

    Args:
        widths: values a row of each tensor (`CaptureContract.widths`).
        seed: ``checksum_seed`` of the rendezvous.

    Raises:
        Lost: rows are missing, or have another length or checksum than the manifest says; the memory's content is undefined.
        StoreError: the store can't be reached.
    """
    raise NotImplementedError


def remove_pack(client: StoreClient, run: str, attempt: int, manifest: Manifest) -> None:
    """Remove the objects of a trained pack."""
    raise NotImplementedError

"""A client of the Mooncake store: objects between registered memory and the store, without a copy of ours.

Mooncake's own calls can block for a minute, report 0 for what was never written and fall back to TCP without a
word. Here every call has a deadline, an error is one of three, and nothing that was stored is ever evicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specbatch.config import Store
from specbatch.errors import RunError


class StoreError(RunError):
    """The store did not do what was asked: unreachable, or an answer that makes no sense."""


class StoreTimeout(StoreError):
    """No answer within the deadline. The call goes on in the background and may still use the memory it was given."""


class StoreFull(StoreError):
    """There was no room for some of the objects; nothing that was stored before is touched."""

    stored: list[bool]
    """Which of the objects of the put were stored; the others were not, and can be put again."""


class StoreAddress(Protocol):
    """What a client must know of an attempt; `specbatch.dispatch.rendezvous.Rendezvous` has it."""

    @property
    def host(self) -> str: ...

    @property
    def master_port(self) -> int: ...


class StoreClient:
    """A process's way into the store, thread-safe.

    Args:
        segment_bytes: memory that this process lends the store, at least 16 MiB; 0: none.
        deadline_s: longest duration of any one call.

    Raises:
        UserError: for a protocol that can't work here, named with the remedy.
        StoreError: if the master can't be reached.
    """

    segment: str
    """Name of this process's segment, for `put` of others; empty if it lends no memory."""

    def __init__(
        self, address: StoreAddress, config: Store, *, segment_bytes: int = 0, deadline_s: float = 20.0
    ) -> None:
        raise NotImplementedError

    def register(self, pointer: int, nbytes: int) -> None:
        """Make memory known to the store, once, before it is put from or got into. It must stay allocated until `close`."""
        raise NotImplementedError

    def put(
        self, keys: Sequence[str], pointers: Sequence[int], sizes: Sequence[int], *, segment: str = "", wait_s: float = 0.0
    ) -> None:
        """Store objects, hard pinned: they stay until somebody removes them.

        Args:
            keys: never used before (`specbatch.manifest.object_key`).
            segment: name of the segment that should hold them; any if it is empty or full.
            wait_s: how long to wait for room.

        Raises:
            StoreFull: there is no room; its ``stored`` says which objects are stored nevertheless.
            StoreError: anything else; what was stored is unknown.
        """
        raise NotImplementedError

    def get(self, keys: Sequence[str], pointers: Sequence[int], sizes: Sequence[int]) -> list[str | None]:
        """Copy objects into memory.

        Returns:
            for each object None, or why it is lost: it is not there, its owner is gone, or it has another length.
            Whether the bytes are right is not checked here (`specbatch.transfer.fetch`).

        Raises:
            StoreError: the store can't be reached: nothing is known about the objects.
        """
        raise NotImplementedError

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects, whoever is reading them; those that are not there are no error."""
        raise NotImplementedError

    def remove_prefix(self, prefix: str) -> int:
        """Remove all objects whose keys start with ``prefix``; returns how many."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the store; the objects in this process's segment vanish. Takes about 2 s."""
        raise NotImplementedError


def checksum(buffer: object, seed: int) -> str:
    """XXH3-128 of memory, in hexadecimal, without a copy.

    Args:
        buffer: a contiguous torch tensor on the CPU of any dtype, or anything with the buffer protocol.
        seed: 64 bits.
    """
    raise NotImplementedError

"""What the engine loop and the capture plugin say to each other.

The loop sends an `Order` with each request, in SGLang's own ``custom_params``; the plugin answers over a ZeroMQ socket
when the rows are in the store, which may be after SGLang has answered the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import xxhash

from specbatch.dispatch.messages import Fault
from specbatch.manifest import Chunk, PackId

SETTINGS_VARIABLE = "SPECBATCH_CAPTURE"
"""Environment variable with the path of a file of `Settings`; the plugin does nothing where it is not set."""
ORDER_KEY = "specbatch"
"""Where an order stands in a request's ``sampling_params.custom_params``."""
PROBE = -1
"""The claim of an order that stores nothing, by which an engine shows that it captures."""

Ranges = tuple[tuple[int, int], ...]
"""Positions in runs from the first to before the second, ascending, none empty."""


class Settings(msgspec.Struct, frozen=True):
    """What the plugin has to know before the first order."""

    rendezvous: str
    """Path of the attempt's rendezvous."""
    attempt: int
    results: str
    """Address of the loop's socket."""
    protocol: Literal["tcp", "rdma"]
    devices: str
    """The store's, as in the configuration."""
    widths: dict[str, int]
    """Values a row of each tensor."""
    buffer_bytes: int
    """Host memory for rows on their way into the store."""
    put_timeout_s: float
    """How long rows may wait for room in the store."""


class Order(msgspec.Struct, frozen=True):
    """Store these rows of this request."""

    claim: int
    pack: PackId
    sample: int
    segment: str
    """Segment of the store that should hold them; empty: any."""
    tokens: int
    digest: str
    """`digest` of the tokens: SGLang runs a stub in the place of a request that it can't serve."""
    rows: dict[str, Ranges]
    """The positions wanted of each tensor."""

    @property
    def request_id(self) -> str:
        """Name of the request at the engine."""
        return f"specbatch-{self.claim}-{self.sample}"


class Captured(msgspec.Struct, frozen=True, tag=True):
    """All rows of an order are in the store."""

    claim: int
    sample: int
    chunks: tuple[Chunk, ...]


class NotCaptured(msgspec.Struct, frozen=True, tag=True):
    """An order can't be fulfilled. What was stored of it belongs to nobody."""

    claim: int
    sample: int | None
    """None: none of the claim's."""
    why: str
    fault: Fault


Result = Captured | NotCaptured


def new_order(
    claim: int, pack: PackId, sample: int, segment: str, tokens: np.ndarray, rows: Mapping[str, np.ndarray]
) -> Order:
    """An order for the rows of one sample.

    Args:
        tokens: int ``[tokens]``, what the request holds.
        rows: positions wanted of each tensor, ascending (`CaptureContract.rows`).
    """
    wanted = {name: ranges(positions) for name, positions in rows.items()}
    return Order(claim, pack, sample, segment, len(tokens), digest(tokens), wanted)


def digest(tokens: Iterable[int] | np.ndarray) -> str:
    """XXH3-64 of token ids as 32-bit integers, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(np.asarray(tokens).astype("<i4").tobytes())


def ranges(positions: np.ndarray) -> Ranges:
    """Ascending positions as runs."""
    if not positions.size:
        return ()
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(positions, cuts))


def rows_between(wanted: Ranges, start: int, stop: int) -> np.ndarray:
    """int64 ``[rows]``: the wanted positions from ``start`` to before ``stop``, counted from ``start``."""
    parts: Sequence[np.ndarray] = [
        np.arange(max(first, start), min(last, stop), dtype=np.int64) - start
        for first, last in wanted
        if first < stop and last > start
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

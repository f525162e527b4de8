"""Messages between the engine loop and the capture plugin.

The loop sends a `CaptureRequest` with each request, in SGLang's own ``custom_params``; the plugin answers over a ZeroMQ
socket when the rows are in the store, which may be after SGLang has answered the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import xxhash

from specbatch.dispatch.messages import Fault
from specbatch.drafts.base import CaptureContract
from specbatch.pack_manifest import Chunk, PackId

if TYPE_CHECKING:
    from specbatch.corpus import Sample

SETTINGS_VARIABLE = "SPECBATCH_CAPTURE"
"""Environment variable with the path of a file of `CaptureSettings`; without it, the plugin captures nothing."""
CAPTURE_REQUEST_KEY = "specbatch"
"""Key of a capture request in a request's ``sampling_params.custom_params``."""
PROBE = -1
"""Claim number of probes: capture requests that store nothing and verify what an engine captures."""
HOOKED, PLAIN = 0, 1
"""Samples of the two probes, with the same tokens: the first is observed inside the model, the second is not."""

Ranges = tuple[tuple[int, int], ...]
"""Runs of positions, half open, ascending, none empty."""


class CaptureSettings(msgspec.Struct, frozen=True):
    """Settings that the plugin needs before the first capture request."""

    rendezvous: str
    """Path of the attempt's rendezvous."""
    attempt: int
    results: str
    """Address of the loop's socket."""
    protocol: Literal["tcp", "rdma"]
    devices: str
    """The store's devices, as in the configuration."""
    layers: tuple[int, ...]
    """The target's layers whose outputs SGLang captures, ascending."""
    widths: dict[str, int]
    """Values per row of each tensor."""
    sources: dict[str, Ranges | None]
    """Columns of SGLang's concatenated captured layers that each tensor consists of; None for the states after the
    final norm, and no columns for the embeddings that the first layer reads."""
    buffer_bytes: int
    """Bytes of host memory for rows that are being stored."""
    put_timeout_s: float
    """Seconds that rows may wait for room in the store."""


class CaptureRequest(msgspec.Struct, frozen=True):
    """Asks to store rows of a request."""

    claim: int
    pack: PackId
    sample: int
    segment: str
    """Segment of the store for the rows; empty for any."""
    tokens: int
    digest: str
    """`digest` of the tokens, since SGLang replaces a request that it can't serve by a stub."""
    rows: dict[str, Ranges]
    """The positions of each tensor to capture."""

    @property
    def request_id(self) -> str:
        """Name of the request at the engine."""
        return f"specbatch-{self.claim}-{self.sample}"


class Captured(msgspec.Struct, frozen=True, tag=True):
    """Reports that all rows of a capture request are in the store."""

    claim: int
    sample: int
    chunks: tuple[Chunk, ...]


class NotCaptured(msgspec.Struct, frozen=True, tag=True):
    """Reports that a capture request can't be fulfilled. Objects that were stored for it are garbage."""

    claim: int
    sample: int | None
    """Sample that failed; None if it was no particular one."""
    why: str
    fault: Fault
    final: bool = False
    """Whether every engine would fail in the same way, with any pack of this kind."""


Result = Captured | NotCaptured


def new_capture_request(
    claim: int, pack: PackId, sample: int, segment: str, tokens: np.ndarray, rows: Mapping[str, np.ndarray]
) -> CaptureRequest:
    """Return a capture request for the rows of one sample.

    Args:
        tokens: tokens of the request, int ``[tokens]``.
        rows: positions of each tensor to capture, ascending (`CaptureContract.rows`).
    """
    wanted = {name: ranges(positions) for name, positions in rows.items()}
    return CaptureRequest(claim, pack, sample, segment, len(tokens), digest(tokens), wanted)


def needed_tokens(sample: Sample, rows: Mapping[str, np.ndarray]) -> int:
    """Return the number of a sample's first tokens that an engine has to compute; 0 if none.

    Args:
        rows: positions of each tensor to capture, ascending.
    """
    # The states of a token depend on those before it only.
    needed = max((int(positions[-1]) + 1 for positions in rows.values() if positions.size), default=0)
    # SGLang decodes the tokens that come with images and encodes their text again: a cut text may give others.
    return len(sample.input_ids) if needed and sample.images else needed


def sources(contract: CaptureContract, hidden: int) -> dict[str, Ranges | None]:
    """Return the `CaptureSettings.sources` of a contract.

    Args:
        hidden: width of the target's states.
    """
    place = {layer: index for index, layer in enumerate(contract.layers)}
    found: dict[str, Ranges | None] = {}
    for name, spec in contract.tensors.items():
        if spec.layers is None:
            found[name] = None
            continue
        columns = [np.arange(hidden) + place[layer] * hidden for layer in spec.layers]
        found[name] = ranges(np.concatenate(columns)) if columns else ()
    return found


def digest(tokens: Iterable[int] | np.ndarray) -> str:
    """Return the XXH3-64 hash of token ids as 32-bit integers, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(np.asarray(tokens).astype("<i4").tobytes())


def ranges(positions: np.ndarray) -> Ranges:
    """Convert ascending positions to runs."""
    if not positions.size:
        return ()
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(positions, cuts))


def rows_between(wanted: Ranges, start: int, stop: int) -> np.ndarray:
    """Return the positions to capture from ``start`` to before ``stop``, relative to ``start``: int64 ``[rows]``."""
    parts: Sequence[np.ndarray] = [
        np.arange(max(first, start), min(last, stop), dtype=np.int64) - start
        for first, last in wanted
        if first < stop and last > start
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

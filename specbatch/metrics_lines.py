"""The one reader of ``metrics.jsonl``, which has a line for each trained step.

A run that continues, or was killed, may leave half a line at the end, which is ignored. A whole line that can't be
parsed is reported as damage.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from specbatch.errors import UserError

LONGEST_BYTES = 1 << 12
"""Assumed most bytes of a line, if only the last lines of a file are read."""


class MetricsLine(msgspec.Struct, frozen=True):
    """One step (`specbatch.training.metrics.metrics_line`); values that are not finite are None."""

    step: int
    loss: float | None = None
    losses: list[float | None] = []
    accuracy: list[float | None] = []
    terms: list[str] = []
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: int = 0
    loss_tokens: int = 0
    void_packs: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    tokens_per_s: float = 0.0
    snapshot_s: float = 0.0
    skipped: str = ""
    evaluation: dict[str, Any] | None = None


def read_metrics(path: Path) -> list[MetricsLine]:
    """Return the lines in the order of the file; none if there is no such file.

    Raises:
        UserError: a line is damaged.
    """
    return _decoded(path, whole_lines(path))


def recent_metrics(path: Path, most: int) -> list[MetricsLine]:
    """Return the last lines, without reading the whole file. Raises the same as `read_metrics`.

    Args:
        most: number of lines; fewer are returned if they are very long.
    """
    room = most * LONGEST_BYTES
    try:
        with path.open("rb") as file:
            begin = max(0, file.seek(0, os.SEEK_END) - room)
            file.seek(begin)
            lines = file.read().splitlines(keepends=True)[1 if begin else 0 :]
    except FileNotFoundError:
        return []
    return _decoded(path, _whole(lines))[-most:]


def last_step(path: Path) -> int:
    """Return the highest step in the file; 0 if there is none. Raises the same as `read_metrics`."""
    return max((line.step for line in read_metrics(path)), default=0)


class MetricsTail:
    """Reads the lines that are added to a metrics file, as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._last = b""
        """The line that ends there."""

    def read(self) -> list[MetricsLine]:
        """Return the lines that are new since the last call; after a rewind of the file, all of them. Raises the same
        as `read_metrics`."""
        try:
            with self.path.open("rb") as file:
                # A file that was rewound may be longer again by now, but its lines are others: they have times.
                file.seek(self._at - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._at = 0
                    file.seek(0)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        if whole or not self._at:
            self._at, self._last = self._at + sum(map(len, whole)), whole[-1] if whole else b""
        return _decoded(self.path, _whole(whole))


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file of JSON objects, except half a line at its end; none if there is no such file."""
    try:
        with path.open("rb") as file:
            yield from _whole(file)
    except FileNotFoundError:
        return


def _whole(lines: Iterable[bytes]) -> Iterator[bytes]:
    return (line for line in lines if line.endswith(b"}\n"))


def _decoded(path: Path, lines: Iterable[bytes]) -> list[MetricsLine]:
    decode = msgspec.json.Decoder(MetricsLine).decode
    found = []
    for line in lines:
        try:
            found.append(decode(line))
        except msgspec.DecodeError:
            # Python writes NaN and Infinity, which JSON does not have.
            try:
                found.append(msgspec.convert(_finite(json.loads(line)), MetricsLine))
            except (ValueError, msgspec.ValidationError) as error:
                raise UserError(f"{path}: a line is damaged: {error}: {line[:80]!r}") from error
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value

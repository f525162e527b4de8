"""Timestamps in run directories: UTC, ISO 8601. For people only; no decision depends on them."""

from __future__ import annotations

import datetime
import time


def timestamp(seconds: float | None = None) -> str:
    """Format seconds since 1970, by default the current time, as ``2026-01-02T03:04:05.678+00:00``."""
    moment = datetime.datetime.fromtimestamp(time.time() if seconds is None else seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds")


def seconds_of(text: str) -> float:
    """Return the seconds since 1970 of a text that `timestamp` wrote.

    Raises:
        ValueError: the text is not a timestamp.
    """
    return datetime.datetime.fromisoformat(text).timestamp()

"""Decides when the head writes ``status.json``: often enough for people, rarely enough for a shared file system.

Each write costs the file system's metadata server two requests, and a run may take days next to hundreds of others.
"""

from __future__ import annotations

import msgspec

from specbatch.status_file import EngineStatus, PackCounts, Status, StoreUse

SOONEST_S = 2.0
"""Least seconds between two writes."""
COUNTERS_S = 5.0
"""Seconds between two writes if only numbers grew."""
LATEST_S = 10.0
"""Seconds between two writes if nothing changed: the file's age shows that the head is alive."""


class StatusPace:
    """Decides whether to write a status now. Pure.

    Args:
        soonest_s: see `SOONEST_S`.
        counters_s: see `COUNTERS_S`.
    """

    def __init__(self, soonest_s: float = SOONEST_S, counters_s: float = COUNTERS_S) -> None:
        self._soonest_s, self._counters_s = soonest_s, counters_s
        self._written = Status()
        self._at: float | None = None

    def due(self, status: Status, now: float) -> bool:
        """Return whether to write this status; if so, it counts as written.

        Args:
            now: seconds of a monotonic clock.
        """
        if self._at is not None and now - self._at < self._wait_s(status):
            return False
        self._written, self._at = status, now
        return True

    def _wait_s(self, status: Status) -> float:
        if _without_numbers(status) != _without_numbers(self._written):
            return self._soonest_s
        if _progress(status) != _progress(self._written):
            return self._counters_s
        return LATEST_S


def _without_numbers(status: Status) -> Status:
    """Return the status without its numbers: only the states of engines, and whether there is an idle alarm."""
    engines = tuple(EngineStatus(engine.name, engine.state) for engine in status.engines)
    return msgspec.structs.replace(
        status, updated="", ran_s=0.0, step=0, window=PackCounts(), store=StoreUse(), waiting=(), engines=engines,
        idle=str(bool(status.idle)), answers=None,
    )  # fmt: skip


def _progress(status: Status) -> list[object]:
    """Return the numbers that grow only while the run makes progress, unlike the ages of reports."""
    engines = [(engine.claims, engine.packs) for engine in status.engines]
    return [status.step, status.window, status.store, status.answers, *engines]

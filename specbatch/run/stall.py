"""Detects an attempt without progress, and describes what waits for what."""

from __future__ import annotations

from specbatch.dispatch.messages import Phase, Report
from specbatch.run.heartbeat import SILENT_S


class Stall:
    """Watches for progress.

    While all existing engines are starting, nothing is wrong: their controllers limit how long and how often they may
    start.

    Args:
        timeout_s: seconds without any progress that are too long.
    """

    def __init__(self, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._progress: tuple[int, ...] = ()
        self._since = now

    def look(self, report: Report, now: float) -> str:
        """Return why the attempt can't continue, if there was no progress for too long; empty while it can.

        Args:
            now: seconds of a monotonic clock.
        """
        progress = (report.step, report.stored, report.ranks, *(engine.packs for engine in report.engines))
        if progress != self._progress or report.phase is not Phase.WORK or _starts(report):
            self._progress, self._since = progress, now
        if now - self._since < self._timeout_s:
            return ""
        return f"no progress for {self._timeout_s:.0f} s: {'; '.join(who_waits(report))}"


def who_waits(report: Report) -> list[str]:
    """Describe what ranks and engines wait for."""
    words = [f"rank {rank} waits for pack {pack[0]}.{pack[1]}" for rank, pack in report.waiting]
    words += [
        f"engine {engine.name} is {engine.state} with {engine.claims} packs, heard {engine.last_heard_s:.0f} s ago"
        for engine in report.engines
    ]
    return words or ["no engine and no rank has reported"]


def _starts(report: Report) -> bool:
    """Return whether all existing engines are still starting."""
    states = {engine.state for engine in report.engines if engine.last_heard_s < SILENT_S}
    return bool(states) and states <= {"starting", "restarting"}

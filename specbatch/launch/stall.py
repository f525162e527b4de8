"""An attempt in which nothing moves any more: who waits for whom, and for how long."""

from __future__ import annotations

from specbatch.dispatch.messages import Phase, Report
from specbatch.launch.pulse import SILENT_S


class Stall:
    """Watches for progress.

    While all that there is of engines starts, nothing is wrong: how long that may take, and how often, is a matter
    between the engine and its controller.

    Args:
        timeout_s: without any progress.
    """

    def __init__(self, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._progress: tuple[int, ...] = ()
        self._since = now

    def look(self, report: Report, now: float) -> str:
        """Why the attempt can't go on, if nothing has moved for too long; empty while it can.

        Args:
            now: in seconds, of a clock that only goes forward.
        """
        progress = (report.step, report.stored, report.ranks, *(engine.packs for engine in report.engines))
        if progress != self._progress or report.phase is not Phase.WORK or _starts(report):
            self._progress, self._since = progress, now
        if now - self._since < self._timeout_s:
            return ""
        return f"no progress for {self._timeout_s:.0f} s: {'; '.join(who_waits(report))}"


def who_waits(report: Report) -> list[str]:
    """Who waits for whom, in words."""
    words = [f"rank {rank} waits for pack {pack[0]}.{pack[1]}" for rank, pack in report.waiting]
    words += [
        f"engine {engine.name} is {engine.state} with {engine.claims} packs, heard {engine.last_heard_s:.0f} s ago"
        for engine in report.engines
    ]
    return words or ["no engine and no rank has been heard of"]


def _starts(report: Report) -> bool:
    """Whether engines that are there have yet to become ready, all of them."""
    states = {engine.state for engine in report.engines if engine.last_heard_s < SILENT_S}
    return bool(states) and states <= {"starting", "restarting"}

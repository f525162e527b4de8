"""The idle alarm: reports GPUs that wait for the other side most of the time, for longer than a set time. Pure.

Nothing is broken then, but half of the job is wasted.
"""

from __future__ import annotations

import math

from specbatch.dispatch.messages import Phase, Report

MOST = 0.5
"""Share of the time above which waiting is reported."""


class Idle:
    """Measures how much engines and ranks wait.

    Args:
        alarm_s: seconds over which shares are computed; nothing is reported before they have passed.
    """

    def __init__(self, alarm_s: float) -> None:
        self._alarm_s = alarm_s
        self._since: float | None = None
        self._last = 0.0
        self._ranks = self._engines = 0.0

    def look(self, report: Report, now: float) -> str:
        """Return which side waits and what to do about it; empty while both sides are busy.

        Args:
            now: seconds of a monotonic clock.
        """
        ready = [engine for engine in report.engines if engine.state == "ready"]
        if report.phase is not Phase.WORK or not report.ranks or not ready:
            self._since, self._ranks, self._engines = None, 0.0, 0.0
            return ""
        if self._since is None:
            self._since = self._last = now
        # Exponential moving averages over the time of the alarm.
        fade = math.exp((self._last - now) / self._alarm_s)
        self._last = now
        self._ranks += (1 - fade) * (len(report.waiting) / report.ranks - self._ranks)
        self._engines += (1 - fade) * (sum(not engine.claims for engine in ready) / len(ready) - self._engines)
        if now - self._since < self._alarm_s:
            return ""
        if self._ranks > MOST:
            return (
                f"ranks wait for packs {100 * self._ranks:.0f} % of the time: more engines would help "
                "(specbatch scale RUN --engines +1)"
            )
        if self._engines > MOST:
            return (
                f"engines are idle {100 * self._engines:.0f} % of the time, since the ranks are too slow for "
                "them; fewer engines, or more training.ranks, cost less"
            )
        return ""

"""What came of a campaign, as a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from tests.faults.campaign import Tally

HEAD = ("fault", "count", "recovered", "steps retrained: mean", "most", "seconds to the next step: median", "most")


def table(tallies: Mapping[str, Tally]) -> str:
    """One line a kind, and their sum."""
    every = Tally(
        count=sum(tally.count for tally in tallies.values()),
        recovered=sum(tally.recovered for tally in tallies.values()),
        retrained=[steps for tally in tallies.values() for steps in tally.retrained],
        seconds=[seconds for tally in tallies.values() for seconds in tally.seconds],
    )
    rows = [HEAD, ("---",) + ("---:",) * (len(HEAD) - 1)]
    rows += [_row(name, tally) for name, tally in [*sorted(tallies.items()), ("all", every)]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str, tally: Tally) -> tuple[str, ...]:
    counts = (name, str(tally.count), str(tally.recovered))
    if not tally.seconds:
        return (*counts, "", "", "", "")
    steps, seconds = tally.retrained, tally.seconds
    return (
        *counts,
        f"{statistics.mean(steps):.1f}",
        str(max(steps)),
        f"{statistics.median(seconds):.1f}",
        f"{max(seconds):.1f}",
    )

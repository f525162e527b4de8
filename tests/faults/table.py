"""What came of faults, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tests.faults.tally import Tally

if TYPE_CHECKING:
    from tests.faults.simulation import Stats

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


def simulated(stats: Stats, seed: int, seconds: float) -> str:
    """What came of a simulation."""
    rows = [("fault", "count"), ("---", "---:")]
    rows += [(name.replace("_", " "), str(count)) for name, count in sorted(stats.faults.items())]
    return (
        f"Seed {seed}: {stats.faults.total()} faults in {stats.lives} simulated runs, {stats.events} events, "
        f"{stats.steps} steps of which {stats.retrained} were trained again, {stats.simulated_s:.0f} simulated seconds "
        f"in {seconds:.0f} s. Every run trained its plan, each step once and in order.\n\n"
        + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    )

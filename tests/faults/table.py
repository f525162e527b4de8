"""The results of faults, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.tally import KEPT, Tally, read

if TYPE_CHECKING:
    from tests.faults.simulation import Stats

HEAD = ("fault", "count", "recovered", "steps retrained: mean", "most", "seconds to the next step: median", "most")


def table(tallies: Mapping[str, Tally]) -> str:
    """Return one line per kind, and their sum."""
    every = _added(tallies.values())
    rows = [HEAD, ("---",) + ("---:",) * (len(HEAD) - 1)]
    rows += [_row(name, tally) for name, tally in [*sorted(tallies.items()), ("all", every)]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summed(folders: Sequence[Path]) -> str:
    """Return one table with the counts of several campaigns."""
    kept = [read(folder / KEPT) for folder in folders]
    names = {name for _, tallies in kept for name in tallies}
    every = {name: _added(tallies[name] for _, tallies in kept if name in tallies) for name in names}
    faults = sum(tally.count for tally in every.values())
    return f"{faults} faults in {sum(runs for runs, _ in kept)} runs.\n\n{table(every)}"


def _added(tallies: Iterable[Tally]) -> Tally:
    added = Tally()
    for tally in tallies:
        added.count += tally.count
        added.recovered += tally.recovered
        added.retrained += tally.retrained
        added.seconds += tally.seconds
    return added


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
    """Return the results of a simulation."""
    rows = [("fault", "count"), ("---", "---:")]
    rows += [(name.replace("_", " "), str(count)) for name, count in sorted(stats.faults.items())]
    return (
        f"Seed {seed}: {stats.faults.total()} faults in {stats.lives} simulated runs, {stats.events} events, "
        f"{stats.steps} steps of which {stats.retrained} were trained again, {stats.simulated_s:.0f} simulated seconds "
        f"in {seconds:.0f} s. Every run trained its plan, each step once and in order.\n\n"
        + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    )

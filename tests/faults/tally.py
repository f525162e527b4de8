"""The results of faults of one kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from specbatch.rundir import write_json

KEPT = "tallies.json"
"""File in a campaign's folder: how many runs were compared, and a tally for each kind of fault in them."""


@dataclass
class Tally:
    """Counts, and what a recovery cost."""

    count: int = 0
    recovered: int = 0
    retrained: list[int] = field(default_factory=list)
    """Steps that were trained again, for each fault that was waited for."""
    seconds: list[float] = field(default_factory=list)
    """Seconds from the fault until the run had recovered and trained a step."""


def write(file: Path, runs: int, tallies: Mapping[str, Tally]) -> None:
    """Keep what a campaign has counted so far."""
    write_json(file, {"runs": runs, "tallies": {name: asdict(tally) for name, tally in tallies.items()}})


def read(file: Path) -> tuple[int, dict[str, Tally]]:
    """Read what `write` has saved."""
    kept = json.loads(file.read_text())
    return kept["runs"], {name: Tally(**facts) for name, facts in kept["tallies"].items()}

"""What became of the faults of one kind."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts, and what a recovery cost."""

    count: int = 0
    recovered: int = 0
    retrained: list[int] = field(default_factory=list)
    """Steps that were trained again, for each fault that was waited for."""
    seconds: list[float] = field(default_factory=list)
    """From the fault until the run had recovered and trained a step."""

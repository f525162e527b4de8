"""The position of a process among an engine's nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EnginePart:
    """A node's part of an engine."""

    nodes: int = 1
    """Number of nodes of the engine."""
    rank: int = 0
    """Number of this node among them."""
    address: str = ""
    """Address at which the others reach this node."""

    def first_task(self, task: int) -> int:
        """Return the task of the engine's first node, which names the engine on all its nodes."""
        return task - self.rank


WHOLE = EnginePart()

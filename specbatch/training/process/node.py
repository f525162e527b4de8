"""The position of this node among the training nodes, and the address of the first one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingNode:
    """A node among the training nodes."""

    node: int
    nodes: int
    address: str
    """The address at which other nodes reach this one."""


ALONE = TrainingNode(0, 1, "127.0.0.1")

"""Which of the training nodes this is, and where the first one is found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A node among those that train."""

    node: int
    nodes: int
    address: str
    """Of this node, for the others."""


ALONE = Place(0, 1, "127.0.0.1")

"""Wall clocks jump: they are written down for people, and nothing waits, ends or is decided by them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import specbatch

SOURCE = Path(specbatch.__file__).parent
FOR_PEOPLE = {
    "launch/cancel.py",  # when somebody asked
    "launch/head.py",  # in status.json and events.jsonl
    "launch/history.py",  # when an attempt began
    "launch/provenance.py",
    "launch/slurm/jobs.py",  # when a job was submitted
    "verbs/status.py",  # how long ago that was
}
"""Modules that write times down, or show them."""
WALL_CLOCKS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}


def readings(path: Path) -> Iterator[ast.Attribute]:
    """Every mention of a function that reads the wall clock."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if (owner, node.attr) in WALL_CLOCKS:
                yield node


def test_the_wall_clock_is_only_read_to_be_written_down() -> None:
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if any(readings(path))}
    assert found == FOR_PEOPLE

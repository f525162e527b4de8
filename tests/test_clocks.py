"""Wall clocks jump: nothing waits, ends or is decided by them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import specbatch

SOURCE = Path(specbatch.__file__).parent
DECIDING = ("dispatch", "inference", "training", "transfer", "snapshot", "run/local.py", "run/restarts.py")
"""Modules that limit waiting and judge silence. The rest of `run` only records times for people."""
WALL_CLOCKS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}


def readings(path: Path) -> Iterator[ast.Attribute]:
    """Every mention of a function that reads the wall clock."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if (owner, node.attr) in WALL_CLOCKS:
                yield node


def test_nothing_is_decided_by_the_wall_clock() -> None:
    paths = [path for name in DECIDING for path in ([SOURCE / name] if "." in name else (SOURCE / name).rglob("*.py"))]
    assert len(paths) > 50
    assert [str(path) for path in paths if any(readings(path))] == []


def test_a_reading_of_the_wall_clock_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import time, datetime\nx = time.time()\ny = datetime.datetime.now()\nz = time.monotonic()"
    )
    assert len([*readings(tmp_path / "a.py")]) == 2

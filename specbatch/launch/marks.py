"""How each component of an attempt ended: a small file that the head reads, wherever the component ran."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from specbatch.rundir import RunDir, read_json, write_json


@dataclass(frozen=True)
class Mark:
    """The end of one task of a component."""

    component: str
    task: int
    why: str = ""
    """Why it failed; empty if it did what it was started for."""

    again: bool = False
    """Whether another attempt may do better."""

    @property
    def failed(self) -> bool:
        return bool(self.why)


def leave_mark(run_dir: RunDir, attempt: int, mark: Mark) -> None:
    """Write down how a task ended."""
    write_json(_path(run_dir, attempt, mark.component, mark.task), asdict(mark))


def read_mark(run_dir: RunDir, attempt: int, component: str, task: int) -> Mark | None:
    """How a task ended, or None while it has not."""
    found = read_json(_path(run_dir, attempt, component, task))
    return None if found is None else Mark(**found)


def failed_marks(run_dir: RunDir, attempt: int) -> list[Mark]:
    """Tasks that failed, the first one first."""
    paths = sorted((run_dir.attempt(attempt) / "ended").glob("*.json"), key=lambda path: path.stat().st_mtime)
    marks = [Mark(**read_json(path)) for path in paths]
    return [mark for mark in marks if mark.failed]


def _path(run_dir: RunDir, attempt: int, component: str, task: int) -> Path:
    return run_dir.attempt(attempt) / "ended" / f"{component}-{task}.json"

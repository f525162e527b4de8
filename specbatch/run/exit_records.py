"""How each component of an attempt ended: a small file that the head reads, wherever the component ran."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from specbatch.rundir import RunDir, read_json, write_json


@dataclass(frozen=True)
class ExitRecord:
    """The end of one task of a component."""

    component: str
    task: int
    why: str = ""
    """Why it failed; empty if it succeeded."""

    again: bool = False
    """Whether another attempt may succeed."""

    @property
    def failed(self) -> bool:
        return bool(self.why)


def write_exit_record(run_dir: RunDir, attempt: int, record: ExitRecord) -> None:
    """Record how a task ended."""
    write_json(run_dir.ended(attempt, record.component, record.task), asdict(record))


def read_exit_record(run_dir: RunDir, attempt: int, component: str, task: int) -> ExitRecord | None:
    """Return how a task ended; None while it has not."""
    found = read_json(run_dir.ended(attempt, component, task))
    return None if found is None else ExitRecord(**found)


def failed_exit_records(run_dir: RunDir, attempt: int) -> list[ExitRecord]:
    """Return the records of failed tasks, in order of time."""
    paths = sorted((run_dir.attempt(attempt) / "ended").glob("*.json"), key=lambda path: path.stat().st_mtime)
    records = [ExitRecord(**read_json(path)) for path in paths]
    return [record for record in records if record.failed]


def exit_record_names(run_dir: RunDir, attempt: int) -> set[str]:
    """Return names of ended tasks, such as ``training-0``, from one listing of the directory."""
    folder = run_dir.ended(attempt, "head", 0).parent
    try:
        return {path.stem for path in folder.iterdir()}
    except FileNotFoundError:
        return set()

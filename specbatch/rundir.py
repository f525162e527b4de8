"""The run directory: its paths, and small files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOB_LOG = "job.log"
"""Output of the run's job script, over all attempts."""
EVALUATION_LOG = "evaluate.log"
"""Output of the jobs that measure a draft (`specbatch evaluate --submit`)."""


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file atomically: no reader ever sees a part of it, not even after a crash.

    Args:
        mode: permissions; the file never exists with wider ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write a JSON document by `write_whole`."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode(), mode)


def read_json(path: Path) -> Any:
    """Return the JSON document in a file, or None if there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def as_typed(path: Path) -> str:
    """Return a path as a user would type it: relative if it is inside the current directory."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass(frozen=True)
class RunDir:
    """The paths of a run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def mark(self) -> Path:
        """File in every directory that specbatch made; files in other directories are never overwritten."""
        return self.root / ".specbatch"

    def make(self) -> None:
        """Create the directory, and mark it as a run directory."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.mark.exists():
            write_whole(self.mark, b"A run directory: specbatch may overwrite its contents.\n")

    @property
    def foreign(self) -> list[str]:
        """Return the names of files in a directory that specbatch did not create; none if it did, or if there is no
        such directory."""
        if self.mark.exists() or not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir())

    @property
    def leader(self) -> Path:
        """File that exists while a process leads the run outside of Slurm: host and pid."""
        return self.root / "leader.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def jobs(self) -> Path:
        """Folder with a file for each Slurm job of the run."""
        return self.root / "jobs"

    @property
    def submission(self) -> Path:
        """File that exists while it is unknown whether Slurm accepted a job; it holds the token to find that job by."""
        return self.root / "submission.json"

    @property
    def cancelled(self) -> Path:
        """File that exists while the run is cancelled: no job is requeued, and no attempt is started."""
        return self.root / "cancelled.json"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def corpus(self) -> Path:
        """File with the place of the prepared corpus and its fingerprint."""
        return self.root / "corpus.json"

    @property
    def answers(self) -> Path:
        """Folder of the target's answers, one file per shard, if the run generates them."""
        return self.root / "answers"

    @property
    def shards(self) -> Path:
        """Folder with facts about each file of `answers`, and answers of unfinished shards."""
        return self.root / "shards"

    @property
    def questions(self) -> Path:
        """File about the prompts: number of rows, and fingerprints of the data."""
        return self.root / "questions.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def trackers(self) -> Path:
        """Folder for TensorBoard and Weights & Biases."""
        return self.root / "trackers"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def recordings(self) -> Path:
        """Folder of packs as trained, with a folder for each step."""
        return self.root / "recordings"

    @property
    def recording(self) -> Path:
        """File that exists if a draft is trained on recorded steps of another run; it says which."""
        return self.root / "recording.json"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def log(self) -> Path:
        """Log with one line for each interval, for people."""
        return self.root / "run.log"

    def attempt(self, attempt: int) -> Path:
        return self.root / "attempts" / str(attempt)

    def began(self, attempt: int) -> Path:
        """File with the beginning of an attempt."""
        return self.attempt(attempt) / "began.json"

    def last_status(self, attempt: int) -> Path:
        """File with the status of an attempt at its end."""
        return self.attempt(attempt) / "status.json"

    def rendezvous(self, attempt: int) -> Path:
        return self.attempt(attempt) / "rendezvous.json"

    def events(self, attempt: int) -> Path:
        return self.attempt(attempt) / "events.jsonl"

    def ended(self, attempt: int, component: str, task: int) -> Path:
        """File with the end of a component's task."""
        return self.attempt(attempt) / "ended" / f"{component}-{task}.json"

    def component_log(self, attempt: int, component: str, task: int) -> Path:
        return self.attempt(attempt) / "logs" / f"{component}-{task}.log"

    def superseded(self, attempt: int) -> bool:
        """Return whether a later attempt has begun. An attempt that was cut off and returns must not overwrite its
        files."""
        return self.attempt(attempt + 1).exists()

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far, ascending."""
        folder = self.root / "attempts"
        return sorted(int(p.name) for p in folder.glob("*") if re.fullmatch(r"\d+", p.name))

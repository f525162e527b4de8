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


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file so that no reader, and no crash, ever sees a part of it.

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
    """`write_whole` of a JSON document."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode(), mode)


def read_json(path: Path) -> Any:
    """The JSON document, or None if there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class RunDir:
    """Paths of a run (DESIGN: the run directory)."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def jobs(self) -> Path:
        """The Slurm jobs of the run, a file each."""
        return self.root / "jobs"

    @property
    def submission(self) -> Path:
        """There while nobody knows whether Slurm took a job: what that job would be found by."""
        return self.root / "submission.json"

    @property
    def cancelled(self) -> Path:
        """There while the user does not want the run to go on: nobody requeues it or starts another attempt."""
        return self.root / "cancelled.json"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def corpus(self) -> Path:
        """Where the prepared corpus lies, and its fingerprint."""
        return self.root / "corpus.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def recordings(self) -> Path:
        """Packs as trained, a folder each step."""
        return self.root / "recordings"

    @property
    def recording(self) -> Path:
        """There where a draft is trained on the recorded steps of another run: which ones."""
        return self.root / "recording.json"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def log(self) -> Path:
        """One line an interval, for people."""
        return self.root / "run.log"

    def attempt(self, attempt: int) -> Path:
        return self.root / "attempts" / str(attempt)

    def began(self, attempt: int) -> Path:
        """What an attempt began with."""
        return self.attempt(attempt) / "began.json"

    def last_status(self, attempt: int) -> Path:
        """How an attempt stood at its end."""
        return self.attempt(attempt) / "status.json"

    def rendezvous(self, attempt: int) -> Path:
        return self.attempt(attempt) / "rendezvous.json"

    def events(self, attempt: int) -> Path:
        return self.attempt(attempt) / "events.jsonl"

    def component_log(self, attempt: int, component: str, task: int) -> Path:
        return self.attempt(attempt) / "logs" / f"{component}-{task}.log"

    def superseded(self, attempt: int) -> bool:
        """Whether a later attempt has begun: one that was cut off and is back must not write what is the later's."""
        return self.attempt(attempt + 1).exists()

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far, ascending."""
        folder = self.root / "attempts"
        return sorted(int(p.name) for p in folder.glob("*") if re.fullmatch(r"\d+", p.name))

"""Reads the files of a run directory. Nothing is written; missing values are None or empty."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specbatch.errors import UserError
from specbatch.metrics_lines import read_metrics
from specbatch.rundir import RunDir, read_json
from specbatch.status_file import Status, read_status
from specbatch.timestamps import seconds_of

SCALARS = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "seconds", "wait_s", "snapshot_s")
"""Keys of a metrics line that hold one number."""


@dataclass
class Metrics:
    """``metrics.jsonl`` in columns: ``S`` steps, ``K`` terms of the loss."""

    step_S: np.ndarray
    """int64, ascending."""
    terms: list[str]
    """Names of the terms."""
    scalars: dict[str, np.ndarray]
    """float64 ``[S]`` for each of `SCALARS`; NaN where a line has none."""
    losses_SK: np.ndarray
    """float64."""
    accuracy_SK: np.ndarray
    """float64."""
    tokens_S: np.ndarray
    """int64, of each step."""
    loss_tokens_S: np.ndarray
    """int64, of each step."""
    void_S: np.ndarray
    """int64, packs that trained as zero."""
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Evaluations by step, ascending."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Reason why a step was skipped, by step."""

    def __len__(self) -> int:
        return len(self.step_S)


@dataclass(frozen=True)
class AttemptRecord:
    """The beginning and the end of an attempt; times in seconds since 1970."""

    number: int
    began: float | None
    ended: float | None
    """Time of its last sign of life."""
    job: int
    restart: int
    nodes: dict[str, list[str]]
    """Nodes of each component."""
    state: str
    why: str


@dataclass
class RunRecord:
    """A run directory."""

    path: Path
    name: str
    config: dict[str, Any]
    metrics: Metrics
    attempts: list[AttemptRecord]
    status: Status
    provenance: dict[str, Any]
    corpus: dict[str, Any]
    """The prepared data: ``train`` and ``heldout`` with their counts."""
    evaluation: dict[str, Any] | None
    """``evaluation.json``."""
    submitted: dict[int, float]
    """When each Slurm job was submitted."""
    snapshots: list[int]
    """Steps whose snapshots are still there."""

    @property
    def dir(self) -> RunDir:
        return RunDir(self.path)

    def setting(self, name: str, default: Any = None) -> Any:
        """A value of the configuration, by its name as ``draft.vocab_size``."""
        section, _, key = name.partition(".")
        found = self.config.get(section)
        return found.get(key, default) if isinstance(found, dict) else default


def read_run(path: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UserError: it is not a run directory, or one of its files is damaged.
    """
    run_dir = RunDir(path.absolute())
    if not run_dir.config.is_file():
        raise UserError(f"{path}: is not a run directory: it has no config.yaml; start a run with `specbatch run`")
    config = _config(run_dir.config)
    status = read_status(run_dir.status) or Status()
    return RunRecord(
        path=run_dir.root,
        name=str((config.get("run") or {}).get("name") or run_dir.root.name),
        config=config,
        metrics=read_columns(run_dir.metrics),
        attempts=[_attempt(run_dir, number, status) for number in run_dir.attempts()],
        status=status,
        provenance=_document(run_dir.provenance),
        corpus=_document(run_dir.corpus),
        evaluation=_document(run_dir.evaluation) or None,
        submitted=_submitted(run_dir),
        snapshots=sorted(int(p.parent.name[5:]) for p in run_dir.snapshots.glob("step-[0-9]*/manifest.json")),
    )


def read_columns(path: Path) -> Metrics:
    """Read ``metrics.jsonl``; the last line of a duplicate step counts."""
    lines = {line.step: line for line in read_metrics(path)}
    ordered = [lines[step] for step in sorted(lines)]
    count = max((max(len(line.losses), len(line.accuracy)) for line in ordered), default=0)
    names = next((line.terms for line in reversed(ordered) if line.terms), [])
    return Metrics(
        step_S=np.array([line.step for line in ordered], dtype=np.int64),
        terms=[names[k] if k < len(names) else f"step {k}" for k in range(count)],
        scalars={name: _numbers([getattr(line, name) for line in ordered]) for name in SCALARS},
        losses_SK=_table([line.losses for line in ordered], count),
        accuracy_SK=_table([line.accuracy for line in ordered], count),
        tokens_S=np.array([line.tokens for line in ordered], dtype=np.int64),
        loss_tokens_S=np.array([line.loss_tokens for line in ordered], dtype=np.int64),
        void_S=np.array([line.void_packs for line in ordered], dtype=np.int64),
        evaluations={line.step: line.evaluation for line in ordered if line.evaluation},
        skipped={line.step: line.skipped for line in ordered if line.skipped},
    )


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _table(rows: list[list[float | None]], width: int) -> np.ndarray:
    table = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row  # numpy makes NaN of None
    return table


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML: {error}") from error
    return found if isinstance(found, dict) else {}


def _document(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _attempt(run_dir: RunDir, number: int, newest: Status) -> AttemptRecord:
    began = _document(run_dir.began(number))
    status = read_status(run_dir.last_status(number)) or (newest if newest.attempt == number else Status())
    return AttemptRecord(
        number=number,
        began=began.get("began") or (seconds_of(status.began) if status.began else None),
        ended=seconds_of(status.updated) if status.updated else None,
        job=began.get("job", 0),
        restart=began.get("restart", 0),
        nodes=began.get("nodes") or {},
        state=status.state or "killed",
        why=status.why,
    )


def _submitted(run_dir: RunDir) -> dict[int, float]:
    jobs = map(_document, run_dir.jobs.glob("[0-9]*.json"))
    return {job["id"]: job["submitted"] for job in jobs if job.get("kind") == "run" and job.get("submitted")}

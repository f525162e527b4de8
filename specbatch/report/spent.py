"""Where the time of a run went: the parts of each attempt, and node-hours by component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from specbatch.report.history import History
from specbatch.report.reading import AttemptRecord, RunRecord

PARTS = {
    "queue": "in Slurm's queue",
    "start": "until its first step began: loading, engines starting, first packs",
    "training": "computing steps, and the moments between them",
    "waiting": "trainers waited for packs",
    "snapshot": "trainers waited for snapshots",
    "evaluation": "evaluations during training",
    "again": "restarts of ranks, and steps trained a second time",
    "after": "after the last step: last snapshot, export, measurement, shutdown",
}
"""Parts of an attempt's time, in order, and what they are."""


@dataclass(frozen=True)
class Spent:
    """The time of one attempt, in seconds."""

    attempt: AttemptRecord
    parts: dict[str, float]
    """Seconds of each part, by `PARTS`."""
    steps: int
    """Steps of it that count."""

    @property
    def ran_s(self) -> float:
        """Seconds since the attempt began."""
        return sum(self.parts.values()) - self.parts["queue"]


def spent(run: RunRecord, history: History) -> list[Spent]:
    """The time of each attempt. An attempt that left no events has only a start, or nothing."""
    return [_of_attempt(run, history, attempt) for attempt in run.attempts]


def node_hours(found: list[Spent]) -> dict[str, float]:
    """Return the hours of each component's nodes; of the single machine if no nodes were recorded."""
    hours: dict[str, float] = {}
    for each in found:
        nodes = {name: len(of) for name, of in each.attempt.nodes.items()} or {"this machine": 1}
        for name, count in nodes.items():
            hours[name] = hours.get(name, 0.0) + count * each.ran_s / 3600
    return hours


def _of_attempt(run: RunRecord, history: History, attempt: AttemptRecord) -> Spent:
    parts = dict.fromkeys(PARTS, 0.0)
    submitted = run.submitted.get(attempt.job)
    if submitted is not None and attempt.began is not None and attempt.restart == 0:
        parts["queue"] = max(0.0, attempt.began - submitted)
    mine_S = history.attempt_S == attempt.number
    span = history.spans.get(attempt.number)
    if span is None or not mine_S.any():
        if attempt.began is not None and attempt.ended is not None:
            parts["start"] = max(0.0, attempt.ended - attempt.began)
        return Spent(attempt, parts, 0)
    columns = {name: np.nan_to_num(values[mine_S]) for name, values in run.metrics.scalars.items()}
    seconds, waiting, snapshot = (float(columns[name].sum()) for name in ("seconds", "wait_s", "snapshot_s"))
    steps = run.metrics.step_S[mine_S]
    evaluation = sum(_seconds(run.metrics.evaluations.get(int(step))) for step in steps)
    first_step_s = float(columns["seconds"][0])
    begun = span[0] - first_step_s
    parts["start"] = max(0.0, begun - attempt.began) if attempt.began is not None else 0.0
    between = max(0.0, span[1] - begun - seconds - evaluation)
    again = history.trained[attempt.number] > len(steps) or attempt.number in history.restarted
    parts["again"] = between if again else 0.0
    parts["training"] = max(0.0, seconds - waiting - snapshot) + (0.0 if again else between)
    parts["waiting"], parts["snapshot"], parts["evaluation"] = waiting, snapshot, evaluation
    if attempt.ended is not None and attempt.state != "running":
        parts["after"] = max(0.0, attempt.ended - span[1])
    return Spent(attempt, parts, len(steps))


def _seconds(evaluation: dict[str, Any] | None) -> float:
    return float((evaluation or {}).get("seconds") or 0.0)

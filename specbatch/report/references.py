"""Curves that a run is compared with: the project's reference runs, and the user's earlier runs with the same
target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from specbatch.report.reading import RunRecord
from specbatch.report.thin import buckets

POINTS = 40
"""Points of an earlier run's curve."""


@dataclass(frozen=True)
class Reference:
    """Accuracy of the first term, in training, over the tokens that were trained; ``N`` points."""

    name: str
    source: str
    tokens_N: np.ndarray
    """Ascending."""
    accuracy_N: np.ndarray
    own: bool
    """Whether it is a run of the user, with the same target."""

    def at(self, tokens: float) -> float | None:
        """The accuracy after the given number of tokens; None before the first point, constant after the last one."""
        if not len(self.tokens_N) or tokens < self.tokens_N[0]:
            return None
        return float(np.interp(tokens, self.tokens_N, self.accuracy_N))


def project_references() -> list[Reference]:
    """The runs that the project has measured, as points of their logs."""
    text = resources.files("specbatch.report").joinpath("assets/references.json").read_text(encoding="utf-8")
    return [
        Reference(
            f"{each['name']} ({each['target']})",
            each["source"],
            np.array(each["tokens"], dtype=np.float64),
            np.array([accuracy[0] for accuracy in each["accuracy"]]),
            own=False,
        )
        for each in json.loads(text)
    ]


def earlier(run: RunRecord, others: Sequence[RunRecord]) -> list[Reference]:
    """The curves of other runs with the same target, the run itself left out."""
    return [
        Reference(other.name, str(other.path), *curve(other), own=True)
        for other in others
        if other.path != run.path and len(other.metrics) and same_target(run, other)
    ]


def same_target(run: RunRecord, other: RunRecord) -> bool:
    """Return whether two runs have the same target: by its fingerprint if both have it, else by its path."""
    mine, theirs = (each.provenance.get("target_fingerprint") for each in (run, other))
    if mine and theirs:
        return bool(mine == theirs)
    return bool(run.setting("target.path") == other.setting("target.path"))


def curve(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Tokens trained and mean accuracy of the first term, float ``[N]`` each, without unknown values."""
    metrics = run.metrics
    if not metrics.terms:
        return np.empty(0), np.empty(0)
    cut = buckets(len(metrics), POINTS)
    tokens_N, accuracy_N = cut.last(np.cumsum(metrics.tokens_S)), cut.mean(metrics.accuracy_SK[:, 0])
    known_N = np.isfinite(accuracy_N)
    return tokens_N[known_N].astype(np.float64), accuracy_N[known_N]

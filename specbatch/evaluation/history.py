"""The evaluations during training, read from ``metrics.jsonl``: as text, and the step with the best draft."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from specbatch.metrics_lines import read_metrics


def evaluation_text(evaluation: dict[str, Any]) -> str:
    """``loss 7.012, accuracy 0.51 0.43 0.38, acceptance length 1.87``"""
    accuracy = " ".join("-" if share is None else f"{share:.2f}" for share in evaluation["accuracy"])
    length = evaluation["acceptance_length"]
    told = "unknown" if length is None else f"{length:.2f}"
    return f"loss {evaluation['loss']:.3f}, accuracy {accuracy}, acceptance length {told}"


def evaluations(metrics: Path) -> dict[int, dict[str, Any]]:
    """The evaluations by the step after which they were made."""
    return {line.step: line.evaluation for line in read_metrics(metrics) if line.evaluation is not None}


def best_step(metrics: Path, among: Collection[int]) -> int | None:
    """The step of the best draft: the greatest acceptance length, then the smallest loss, then the latest step.

    Args:
        among: steps to choose from.

    Returns:
        None if none of them was evaluated.
    """
    known = {step: found for step, found in evaluations(metrics).items() if step in among}
    return max(known, key=lambda step: (*merit(known[step]), step), default=None)


def best_evaluation(metrics: Path, trained: int) -> dict[str, Any] | None:
    """The best evaluation after any of the first ``trained`` steps; None if there was none."""
    found = [evaluation for step, evaluation in evaluations(metrics).items() if step <= trained]
    return max(found, key=merit, default=None)


def merit(evaluation: dict[str, Any]) -> tuple[float, float]:
    """Sort key that orders evaluations from worse to better: acceptance length, then loss."""
    return evaluation["acceptance_length"] or 0.0, -evaluation["loss"]

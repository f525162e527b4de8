"""The evaluations during training, as ``metrics.jsonl`` tells of them: in words, and which step's draft is the best."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def evaluation_text(evaluation: dict[str, Any]) -> str:
    """``loss 7.012, accuracy 0.51 0.43 0.38, acceptance length 1.87``"""
    accuracy = " ".join("-" if share is None else f"{share:.2f}" for share in evaluation["accuracy"])
    length = evaluation["acceptance_length"]
    told = "unknown" if length is None else f"{length:.2f}"
    return f"loss {evaluation['loss']:.3f}, accuracy {accuracy}, acceptance length {told}"


def evaluations(metrics: Path) -> dict[int, dict[str, Any]]:
    """The evaluation after each step that was followed by one."""
    if not metrics.is_file():
        return {}
    found = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        # The last line of a run that goes on may be half there.
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if "evaluation" in row:
                found[int(row["step"])] = row["evaluation"]
    return found


def best_step(metrics: Path, among: Collection[int]) -> int | None:
    """The step of the best draft: of the greatest acceptance length, then of the smallest loss, then the latest.

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
    """What makes one evaluation better than another: acceptance length, then loss."""
    return evaluation["acceptance_length"] or 0.0, -evaluation["loss"]

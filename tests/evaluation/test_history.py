"""Evaluations during training, and the choice of the best draft."""

from __future__ import annotations

import json
from pathlib import Path

from specbatch.evaluation.history import best_step, evaluation_text, evaluations


def write(path: Path, found: dict[int, tuple[float | None, float]]) -> Path:
    """Metrics of ten steps, some with acceptance length and loss, and half a line more."""
    rows = [{"step": step, "loss": 9.0} for step in range(1, 11)]
    for step, (length, loss) in found.items():
        rows[step - 1]["evaluation"] = {"acceptance_length": length, "loss": loss, "accuracy": [0.5, None]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "evaluation": {"acc')
    return path


def test_the_best_has_the_greatest_acceptance_length_and_then_the_smallest_loss(tmp_path):
    metrics = write(tmp_path / "m", {2: (1.5, 3.0), 4: (1.7, 2.5), 6: (1.7, 2.0), 8: (1.6, 1.0)})
    assert sorted(evaluations(metrics)) == [2, 4, 6, 8]
    assert best_step(metrics, {2, 4, 6, 8, 10}) == 6
    assert best_step(metrics, {2, 8, 10}) == 8
    assert best_step(metrics, {10}) is None
    assert best_step(tmp_path / "none", {10}) is None


def test_where_no_length_is_known_the_loss_decides(tmp_path):
    assert best_step(write(tmp_path / "m", {2: (None, 3.0), 4: (None, 2.5), 6: (None, 2.7)}), {2, 4, 6}) == 4


def test_an_evaluation_in_words():
    evaluation = {"loss": 7.0123, "accuracy": [0.512, None], "acceptance_length": 1.873}
    assert evaluation_text(evaluation) == "loss 7.012, accuracy 0.51 -, acceptance length 1.87"
    unknown = evaluation | {"acceptance_length": None}
    assert evaluation_text(unknown) == "loss 7.012, accuracy 0.51 -, acceptance length unknown"

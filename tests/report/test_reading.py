"""Run directories as they lie there, whole and damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from specbatch.errors import UserError
from specbatch.report.reading import read_columns, read_run
from tests.report.synthetic import make_run


def test_a_run_is_read_with_all_that_its_directory_says(tmp_path):
    run = read_run(make_run(tmp_path / "a", 40).root)
    assert (run.name, len(run.metrics), run.metrics.terms) == ("a", 40, ["step 0", "step 1", "step 2"])
    assert list(run.metrics.evaluations) == [20, 40]
    assert [(each.number, each.job, each.state) for each in run.attempts] == [
        (1, 701, "stopped"),
        (2, 702, "completed"),
    ]
    assert run.setting("draft.vocab_size") == 3000
    assert run.setting("draft.init_from", "none") == "none"
    assert run.evaluation["acceptance_length"] == 2.31


def test_terms_have_the_names_that_lines_give_them(tmp_path):
    run = read_run(make_run(tmp_path / "a", 20, terms=["slot 1", "slot 2", "confidence"]).root)
    assert run.metrics.terms == ["slot 1", "slot 2", "confidence"]


def test_half_a_line_is_left_out_and_what_is_no_number_is_not_known(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": null, "losses": [null, 2.0], "accuracy": [0.5, null], "grad_norm": NaN, "skipped": "no"}\n'
        '{"step": 2, "loss": 3.0, "losses": [3.0, 2.0], "accuracy": [0.5, 0.25], "grad_norm": 1}\n{"step": 3, "lo'
    )
    found = read_columns(path)
    assert found.step_S.tolist() == [1, 2]
    assert np.isnan(found.scalars["grad_norm"][0])
    assert found.scalars["grad_norm"][1] == 1
    assert np.isnan(found.losses_SK[0, 0])
    assert found.losses_SK[0, 1] == 2.0
    assert found.skipped == {1: "no"}


def test_a_step_that_is_told_twice_counts_as_it_was_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in ((1, 9), (2, 8), (2, 7))))
    assert read_columns(path).scalars["loss"].tolist() == [9, 7]


def test_a_run_that_has_trained_nothing_yet_can_be_read(tmp_path):
    (tmp_path / "config.yaml").write_text("run:\n  dir: x\n")
    run = read_run(tmp_path)
    assert (len(run.metrics), run.metrics.terms, run.attempts, run.evaluation) == (0, [], [], None)


def test_what_is_damaged_is_named(tmp_path):
    run = make_run(tmp_path / "a", 20)
    run.metrics.write_text('{"step": "one"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: a line is damaged"):
        read_run(run.root)
    run.status.write_text("{")
    with pytest.raises(UserError, match=r"status\.json: is not JSON"):
        read_run(run.root)
    run.config.write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml: is not YAML"):
        read_run(run.root)
    with pytest.raises(UserError, match="is not a run directory"):
        read_run(tmp_path / "none")

"""The history from events, and where the time went."""

from __future__ import annotations

import json

import numpy as np
import pytest

from specbatch.report.history import MOST_MARKS, read_history
from specbatch.report.reading import read_run
from specbatch.report.spent import node_hours, spent
from tests.report.synthetic import STEP_S, make_run


def test_each_step_belongs_to_the_attempt_that_trained_it_last(tmp_path):
    run = read_run(make_run(tmp_path / "a", 100).root)
    found = read_history(run)
    # The second attempt went on three steps before the end of the first.
    assert found.attempt_S[:46].tolist() == [1] * 24 + [0] + [1] * 21
    assert set(found.attempt_S[48:].tolist()) <= {0, 2}
    assert found.trained[1] == 49
    assert np.nanmin(np.diff(found.time_S)) > 0


def test_what_happened_is_told_on_the_axis_of_steps(tmp_path):
    found = read_history(read_run(make_run(tmp_path / "a", 300).root))
    told = {(mark.kind, mark.text): mark.step for mark in found.marks}
    assert told["attempt", "attempt 2 began"] == 150
    assert told["fault", "an engine is silent"] in (74, 223)
    assert told["stop", "asked to stop: SIGTERM"] == 150
    assert ("restart", "ranks restarted at step 74") in told
    assert {mark.step for mark in found.marks if mark.kind == "snapshot"} == {100, 200}


def test_thousands_of_faults_become_a_few_marks_and_none_is_lost(tmp_path):
    run = make_run(tmp_path / "a", 2000, attempts=1)
    extra = [{"time": "2026-11-20T08:00:00+00:00", "event": "failed", "why": f"reason {i}"} for i in range(3000)]
    with run.events(1).open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in extra)
    found = read_history(read_run(run.root))
    assert len(found.marks) <= MOST_MARKS
    assert sum(mark.count for mark in found.marks if mark.kind == "fault") == 3001


def test_the_store_holds_what_was_stored_and_not_yet_trained(tmp_path):
    found = read_history(read_run(make_run(tmp_path / "a", 50, attempts=1).root))
    assert np.nanmax(found.store_S) == 4 * (6 << 20)


def test_engines_wait_where_nothing_is_claimed(tmp_path):
    found = read_history(read_run(make_run(tmp_path / "a", 50, attempts=1).root))
    known = found.time_S[np.isfinite(found.time_S)]
    idle = found.engine_idle(known)
    assert idle.mean() == pytest.approx(1 - 0.6 / 1.05, abs=0.03)
    assert np.isnan(found.engine_idle(np.array([0.0, 1.0]))).all()


def test_the_time_of_an_attempt_is_told_in_parts_that_add_up(tmp_path):
    run = read_run(make_run(tmp_path / "a", 200, wait=0.25).root)
    first, second = spent(run, read_history(run))
    assert first.parts["queue"] == pytest.approx(90)
    assert first.parts["start"] == pytest.approx(40, abs=1)
    assert first.parts["waiting"] / (first.parts["training"] + first.parts["waiting"]) == pytest.approx(0.25, abs=0.01)
    assert first.parts["evaluation"] == pytest.approx(4 * 0.6)
    assert second.parts["snapshot"] == pytest.approx(0.05)
    assert second.parts["after"] == pytest.approx(20, abs=0.1)
    assert first.ran_s == pytest.approx(60 + 100 * STEP_S * 1.05, rel=0.05)
    assert node_hours([first])["inference"] == pytest.approx(2 * first.ran_s / 3600)


def test_without_events_an_attempt_has_a_start_and_no_more(tmp_path):
    run = read_run(make_run(tmp_path / "a", 50, attempts=1, events=False).root)
    (only,) = spent(run, read_history(run))
    assert (only.steps, only.parts["training"]) == (0, 0.0)
    assert only.parts["start"] > 50


def test_engines_that_are_silent_because_all_is_trained_are_no_fault(tmp_path):
    run = make_run(tmp_path / "a", 50, attempts=1)
    with run.events(1).open("a") as file:
        file.write(json.dumps({"time": "2026-11-20T08:00:00+00:00", "event": "silent", "engine": "engine-0-a"}) + "\n")
    faults = [mark for mark in read_history(read_run(run.root)).marks if mark.kind == "fault"]
    assert [(mark.step, mark.count) for mark in faults] == [(24, 1)]

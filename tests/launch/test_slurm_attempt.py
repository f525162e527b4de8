"""When a run goes on by itself, and when not."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.config import Config
from specbatch.config.sections import Data, Inference, Run, Target
from specbatch.launch.marks import Mark, leave_mark, read_mark
from specbatch.launch.slurm.ask import Answer
from specbatch.launch.slurm.attempt import FAILED, again, cancelled_now, end, no_progress
from specbatch.launch.slurm.states import Row
from specbatch.rundir import RunDir, read_json, write_json


def config_of(root: Path) -> Config:
    return Config(
        run=Run(dir=str(root), max_restarts=2),
        target=Target(path="target"),
        data=Data(train=["talks.jsonl"]),
        inference=Inference(engines=2, max_restarts=1),
    )


def attempts(root: Path, *ends: tuple[str, int]) -> RunDir:
    run_dir = RunDir(root)
    for number, (state, step) in enumerate(ends, 1):
        run_dir.attempt(number).mkdir(parents=True)
        if state:
            status = {"attempt": number, "state": state, "step": step, "steps": 9, "why": "the store's master died"}
            write_json(run_dir.last_status(number), status)
            write_json(run_dir.status, status)
    return run_dir


def test_attempts_that_fail_without_a_step_are_bounded(tmp_path: Path):
    config = config_of(tmp_path)
    assert not no_progress(attempts(tmp_path / "a", ("failed", 3), ("failed", 3), ("failed", 3)), config)
    run_dir = attempts(tmp_path / "b", ("failed", 3), ("failed", 3), ("failed", 3), ("failed", 3))
    assert "failed 3 times in a row" in no_progress(run_dir, config)
    assert read_json(run_dir.status)["state"] == "failed"
    assert "master died" in read_json(run_dir.status)["why"]


def test_attempts_without_a_word_count_too_and_a_step_starts_the_count_anew(tmp_path: Path):
    config = config_of(tmp_path)
    assert no_progress(attempts(tmp_path / "a", ("", 0), ("", 0), ("", 0)), config)
    assert not no_progress(attempts(tmp_path / "b", ("", 0), ("", 0), ("failed", 4), ("", 0), ("failed", 5)), config)


def test_being_preempted_again_and_again_is_no_failure(tmp_path: Path):
    run_dir = attempts(tmp_path, *[("stopped", 3)] * 9)
    assert not no_progress(run_dir, config_of(tmp_path))


def test_a_component_that_ends_without_a_word_is_started_again_a_few_times(tmp_path: Path):
    config = config_of(tmp_path)
    run_dir = attempts(tmp_path, ("running", 3))
    assert again(run_dir, config, 1, "inference", 0)
    assert not again(run_dir, config, 1, "inference", 1)
    mark = read_mark(run_dir, 1, "inference", 1)
    assert mark is not None
    assert mark.again


def test_a_component_that_said_why_or_whose_attempt_is_over_is_not_started_again(tmp_path: Path):
    config = config_of(tmp_path)
    run_dir = attempts(tmp_path / "a", ("running", 3))
    leave_mark(run_dir, 1, Mark("training", 0))
    assert not again(run_dir, config, 1, "training", 0)
    run_dir = attempts(tmp_path / "b", ("stopping", 3))
    assert not again(run_dir, config, 1, "training", 0)
    run_dir = attempts(tmp_path / "c", ("running", 3), ("running", 3))
    assert not again(run_dir, config, 1, "training", 0)


def test_an_attempt_that_was_cut_off_and_is_back_decides_nothing(tmp_path: Path):
    run_dir = attempts(tmp_path, ("running", 3), ("running", 4))
    leave_mark(run_dir, 1, Mark("head", 0, "attempt 2 has taken over"))
    before = run_dir.status.read_bytes()
    # It neither cancels the job after its own, which is the later attempt, nor asks Slurm for anything.
    assert end(run_dir, config_of(tmp_path), 1, job=7) == FAILED
    assert run_dir.status.read_bytes() == before


@pytest.mark.parametrize(
    ("now", "past", "cancelled"),
    [
        ([("COMPLETING", "")] * 3, ["CANCELLED"], True),
        ([("COMPLETING", "")] * 3, ["REQUEUED"], False),
        ([("RUNNING", "")] * 3, ["RUNNING"], False),
        ([("COMPLETING", "")] * 3, [], True),
        ([("COMPLETING", ""), ("COMPLETING", ""), ("COMPLETING", "TimeLimit")], [], False),
        ([("COMPLETING", ""), ("PENDING", "BeginTime"), ("RUNNING", "")], [], False),
        ([("RUNNING", "")] * 3, [], False),
        ([], [], False),
    ],
)
def test_a_cancelled_job_is_not_requeued(now: list[tuple[str, str]], past: list[str], cancelled: bool):
    rows = [Row(7, index, 7 + index, state, reason=reason) for index, (state, reason) in enumerate(now)]
    answer = Answer({7: rows}, {7: [Row(7, 0, 7, state) for state in past]} if past else {})
    assert cancelled_now(7, answer) is cancelled

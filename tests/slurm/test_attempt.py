"""When a run goes on by itself, and when not."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.config import Config
from specbatch.config.sections import Data, Inference, Run, Target
from specbatch.run.exit_records import ExitRecord, read_exit_record, write_exit_record
from specbatch.rundir import RunDir, read_json, write_json
from specbatch.slurm.attempt import DONE, FAILED, again, cancelled_now, end, looked, no_progress
from specbatch.slurm.query import SlurmJobs
from specbatch.slurm.states import JobRow


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
    record = read_exit_record(run_dir, 1, "inference", 1)
    assert record is not None
    assert record.again


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("inference: line 2: /no/python: No such file or directory", "/no/python: No such file or directory"),
        ("inference: setup: on node3, exit code 1: module load nothere", "setup: on node3, exit code 1: module load"),
        ("head: line 2: another's", "its program can't be run"),
    ],
)
def test_a_component_that_cannot_begin_is_not_tried_again_in_this_job_or_another(tmp_path: Path, line, why):
    run_dir = attempts(tmp_path, ("running", 3))
    (tmp_path / "job.log").write_text(f"an earlier line\n{line}\nsrun: error: node3: task 0: Exited with code 127\n")
    assert not again(run_dir, config_of(tmp_path), 1, "inference", 0, 127)
    record = read_exit_record(run_dir, 1, "inference", 1)
    assert (record.again, why in record.why, "(exit code 127)" in record.why) == (False, True, True)


def test_a_head_that_cannot_begin_ends_the_run_with_its_reason(tmp_path: Path):
    run_dir = attempts(tmp_path, ("", 0))
    (tmp_path / "job.log").write_text("head: line 2: exec: apptainer: not found\n")
    assert end(run_dir, config_of(tmp_path), 1, 7, 127) == FAILED
    status = read_json(run_dir.status)
    assert (status["state"], status["attempt"]) == ("failed", 1)
    assert status["why"] == "head: could not be started: exec: apptainer: not found (exit code 127)"
    # No interface: the task itself left the record.
    run_dir = attempts(tmp_path / "b", ("", 0))
    write_exit_record(run_dir, 1, ExitRecord("head", 0, "slurm.interface: node3 has no address on hsn0"))
    assert end(run_dir, config_of(tmp_path), 1, 7, 1) == FAILED
    assert read_json(run_dir.status)["why"].endswith("no address on hsn0")


def test_what_a_look_at_the_nodes_finds_ends_the_run_and_a_look_that_broke_does_not(tmp_path: Path):
    run_dir = attempts(tmp_path / "a", ("", 0))
    write_exit_record(run_dir, 1, ExitRecord("inference", 1, "node5 has no device file of a GPU"))
    assert looked(run_dir, 1, 7, [0, 1, 0]) == FAILED
    status = read_json(run_dir.status)
    assert (status["state"], status["attempt"]) == ("failed", 1)
    assert status["why"] == "inference: node5 has no device file of a GPU"
    run_dir = attempts(tmp_path / "b", ("", 0))
    (run_dir.root / "job.log").write_text("training: setup: on node2, exit code 1: module load x\n")
    assert looked(run_dir, 1, 7, [0, 0, 126]) == FAILED
    assert read_json(run_dir.status)["why"].startswith("training: could not be started: setup: on node2")
    # It was killed, or the file system hung: the attempt begins all the same.
    run_dir = attempts(tmp_path / "c", ("", 0))
    assert looked(run_dir, 1, 7, [142, 1, 0]) == DONE
    assert read_json(run_dir.status) is None


def test_a_component_that_said_why_or_whose_attempt_is_over_is_not_started_again(tmp_path: Path):
    config = config_of(tmp_path)
    run_dir = attempts(tmp_path / "a", ("running", 3))
    write_exit_record(run_dir, 1, ExitRecord("training", 0))
    assert not again(run_dir, config, 1, "training", 0)
    run_dir = attempts(tmp_path / "b", ("stopping", 3))
    assert not again(run_dir, config, 1, "training", 0)
    run_dir = attempts(tmp_path / "c", ("running", 3), ("running", 3))
    assert not again(run_dir, config, 1, "training", 0)


def test_an_attempt_that_was_cut_off_and_is_back_decides_nothing(tmp_path: Path):
    run_dir = attempts(tmp_path, ("running", 3), ("running", 4))
    write_exit_record(run_dir, 1, ExitRecord("head", 0, "attempt 2 has taken over"))
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
    rows = [JobRow(7, index, 7 + index, state, reason=reason) for index, (state, reason) in enumerate(now)]
    answer = SlurmJobs({7: rows}, {7: [JobRow(7, 0, 7, state) for state in past]} if past else {})
    assert cancelled_now(7, answer) is cancelled

"""The list of a user's runs."""

from __future__ import annotations

import pytest

from specbatch.known_runs import known_runs, register
from specbatch.rundir import RunDir


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def new_run(root):
    root.mkdir(parents=True)
    (root / "config.yaml").write_text("")
    return RunDir(root)


def test_a_registered_run_is_found_from_anywhere_and_once(tmp_path):
    run = new_run(tmp_path / "else where" / "it's a run %j")
    register(run)
    register(run)
    assert known_runs() == [run]


def test_runs_of_the_current_directory_are_found_without_being_registered(tmp_path):
    run = new_run(tmp_path / "here" / "runs" / "one")
    assert known_runs() == [run]
    register(run)
    assert known_runs() == [run]


def test_a_run_that_is_gone_is_passed_over(tmp_path):
    run = new_run(tmp_path / "gone")
    register(run)
    run.config.unlink()
    assert known_runs() == []


def test_a_state_directory_that_cannot_be_written_is_no_reason_not_to_run(tmp_path):
    (tmp_path / "state").write_text("a file")
    register(new_run(tmp_path / "run"))
    assert known_runs() == []

"""An idle alarm under Slurm is mailed once, to whom Slurm's own mail goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specbatch.config import Config, Data, Run, Slurm, Target
from specbatch.run.run_log import RunLog
from specbatch.rundir import RunDir
from specbatch.status_file import Status

IDLE = Status(stage="training", idle="ranks wait for packs 80 % of the time")


@pytest.fixture
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Shows statuses to the log of a run with these directives; returns what the node's mail program was given."""
    program, mails = tmp_path / "bin" / "mail", tmp_path / "mails"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{mails}\ncat >>{mails}\n')
    program.chmod(0o755)

    def look(extra: dict, *statuses: Status, path: str = f"{program.parent}:/usr/bin:/bin") -> str:
        monkeypatch.setenv("PATH", path)
        run = Run(dir=str(tmp_path / "run"), name="mine")
        config = Config(run=run, target=Target(path="x"), data=Data(train=["x"]), slurm=Slurm(extra=extra))
        run_dir = RunDir(tmp_path / "run")
        run_dir.root.mkdir(exist_ok=True)
        with RunLog(run_dir, config, told_elsewhere=False) as log:
            for status in statuses:
                log.look(status)
        until = time.monotonic() + (10 if "mail-user" in extra else 0.2)
        while time.monotonic() < until and not (mails.exists() and mails.read_text().endswith("\n\n")):
            time.sleep(0.02)
        return mails.read_text() if mails.exists() else ""

    return look


def test_an_idle_alarm_is_mailed_at_its_beginning(looks: Callable[..., str]):
    found = looks({"mail-type": "FAIL", "mail-user": "me@example.org"}, Status(stage="training"), IDLE, IDLE)
    assert found.startswith("-s specbatch mine: idle me@example.org\nranks wait for packs 80 % of the time\n")
    assert found.count("-s ") == 1


@pytest.mark.parametrize("extra", [{}, {"mail-type": "NONE"}])
def test_nothing_is_mailed_where_no_mail_is_asked_for(looks: Callable[..., str], extra: dict):
    assert looks(extra, IDLE) == ""


def test_a_node_without_a_mail_program_says_so(looks: Callable[..., str], caplog: pytest.LogCaptureFixture):
    assert looks({"mail-type": "ALL"}, IDLE, path="") == ""
    assert "not mailed" in caplog.text
    assert "this node has no program named mail" in caplog.text

"""A run is led by one process at a time, and a dead one does not block the next."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from specbatch.errors import UserError
from specbatch.run.alone import SILENT_S, alone
from specbatch.run.attempts import begin_attempt
from specbatch.rundir import RunDir, read_json, write_json


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.make()
    return made


@pytest.fixture
def other() -> subprocess.Popen[bytes]:
    """Another process, alive until the test's end."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def told(host: str, pid: int, began: float) -> dict[str, object]:
    return {"host": host, "pid": pid, "pid_began": began}


def test_a_second_leader_is_refused_with_host_and_pid(run_dir: RunDir, other: subprocess.Popen[bytes]) -> None:
    write_json(run_dir.leader, told(socket.gethostname(), other.pid, psutil.Process(other.pid).create_time()))
    with (
        pytest.raises(UserError, match=f"process {other.pid} on {socket.gethostname()} leads this run"),
        alone(run_dir),
    ):
        pass
    other.kill()
    other.wait()
    with alone(run_dir):
        assert read_json(run_dir.leader)["pid"] == os.getpid()
    assert not run_dir.leader.exists()


def test_one_that_leads_an_attempt_is_refused_too(run_dir: RunDir, other: subprocess.Popen[bytes]) -> None:
    run_dir.attempt(1).mkdir(parents=True)
    begin_attempt(run_dir, 1, pid=other.pid)
    with pytest.raises(UserError, match=f"process {other.pid} on "), alone(run_dir):
        pass
    # A zombie is dead.
    other.kill()
    time.sleep(0.1)
    with alone(run_dir):
        pass


def test_another_host_is_believed_while_it_says_something(run_dir: RunDir) -> None:
    write_json(run_dir.leader, told("elsewhere", 7, 0.0))
    with pytest.raises(UserError, match="process 7 on elsewhere"), alone(run_dir):
        pass
    old = time.time() - SILENT_S - 1
    os.utime(run_dir.leader, (old, old))
    with alone(run_dir):
        pass


def test_an_attempt_on_another_host_that_said_it_is_over_is_in_nobodys_way(run_dir: RunDir) -> None:
    run_dir.attempt(1).mkdir(parents=True)
    write_json(run_dir.began(1), {"number": 1, "began": 0.0, "pid_began": 0.0, "host": "elsewhere", "pid": 7})
    write_json(run_dir.status, {"state": "running", "attempt": 1})
    with pytest.raises(UserError, match="process 7 on elsewhere"), alone(run_dir):
        pass
    write_json(run_dir.status, {"state": "stopped", "attempt": 1})
    with alone(run_dir):
        pass

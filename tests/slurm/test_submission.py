"""Submitting a run while other processes try to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.slurm.jobs import record_job
from specbatch.slurm.submission import LONGEST_S, alone, under_way


def test_one_process_at_a_time_submits_and_who_comes_late_is_told_of_the_job(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    before = time.time()
    with alone(run_dir, before) as token:
        written = json.loads(run_dir.submission.read_text())
        assert (written["token"], written["pid"]) == (token, os.getpid())
        record_job(run_dir, 7)
    assert not run_dir.submission.exists()
    with pytest.raises(UserError, match="was submitted as job 7 a moment ago"), alone(run_dir, before):
        pass
    assert not run_dir.submission.exists()
    with alone(run_dir, time.time()):
        pass


def test_a_submission_whose_process_is_gone_is_over():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = {"token": "t", "host": socket.gethostname(), "time": time.time()}
    assert under_way(here | {"pid": os.getppid()})
    assert not under_way(here | {"pid": gone.pid})
    assert not under_way(here | {"pid": os.getpid()}), "this one has begun anew"
    assert under_way(here | {"pid": gone.pid, "host": "login2"}), "of another host nothing is seen"
    assert not under_way(here | {"pid": os.getppid(), "time": time.time() - LONGEST_S - 1})
    assert not under_way({"token": "t", "time": 0.0})

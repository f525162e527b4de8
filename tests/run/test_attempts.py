"""The records of attempts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

from specbatch.run.attempts import begin_attempt, last_status, read_attempt
from specbatch.rundir import RunDir, write_json
from specbatch.slurm.jobs import Job, read_jobs, record_job


def test_an_attempt_keeps_how_the_one_before_stood(tmp_path):
    run_dir = RunDir(tmp_path)
    begin_attempt(run_dir, 1)
    write_json(run_dir.status, {"attempt": 1, "state": "running", "step": 7})
    assert last_status(run_dir, 1).step == 7
    begin_attempt(run_dir, 2, job=12, restart=1, nodes={"head": ["node1"]})
    write_json(run_dir.status, {"attempt": 2, "state": "running", "step": 8})
    assert [last_status(run_dir, n).step for n in (1, 2)] == [7, 8]
    found = read_attempt(run_dir, 2)
    assert (found.job, found.restart, found.nodes, found.pid) == (12, 1, {"head": ["node1"]}, os.getpid())


def test_an_attempt_that_nobody_wrote_down_is_none(tmp_path):
    assert read_attempt(RunDir(tmp_path), 1) is None
    assert last_status(RunDir(tmp_path), 1) is None


def test_a_process_that_is_gone_or_another_does_not_live(tmp_path):
    here = begin_attempt(RunDir(tmp_path), 1)
    assert here.lives() is True
    assert replace(here, pid_began=here.pid_began - 10).lives() is False
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert replace(here, pid=gone.pid).lives() is False
    assert replace(here, host="elsewhere").lives() is None


def test_jobs_come_in_the_order_of_their_submission_and_twice_is_once(tmp_path):
    run_dir = RunDir(tmp_path)
    record_job(run_dir, 9, size=3)
    record_job(run_dir, 10, kind="engines", size=2)
    record_job(run_dir, 100, size=3, after=9)
    record_job(run_dir, 9)
    assert [(job.id, job.kind, job.size, job.after) for job in read_jobs(run_dir)] == [
        (9, "run", 3, 0),
        (10, "engines", 2, 0),
        (100, "run", 3, 9),
    ]
    assert all(isinstance(job, Job) and job.submitted for job in read_jobs(run_dir, "engines"))

"""Slurm's commands against a controller that takes its time, and against jobs that it does not want."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest

from specbatch.errors import UserError
from specbatch.slurm import commands
from tools.lab import Lab

pytestmark = [pytest.mark.light, pytest.mark.timeout(120)]


@pytest.fixture
def cluster(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """The environment of a shell on the login node, inside of some other job that asked for other things."""
    monkeypatch.setenv("SLURM_CONF", str(lab.folder / "slurm.conf"))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SBATCH_PARTITION", "short")
    monkeypatch.setenv("SBATCH_HOLD", "1")
    monkeypatch.setenv("SQUEUE_FORMAT", "%u")
    yield lab
    commands.scancel("--me")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "it's a job.sbatch"
    path.write_text("#!/bin/bash\n#SBATCH --partition=cpu --output=/dev/null\nsleep 60\n")
    return path


def test_variables_of_another_job_do_not_reach_sbatch(cluster: Lab, script: Path):
    job = commands.submit(script)
    assert commands.squeue(f"--jobs={job}", "--format=%P %r").split()[0] == "cpu"
    assert "JobHeldUser" not in commands.squeue(f"--jobs={job}", "--format=%r")


def test_a_job_whose_submission_got_no_answer_is_found_and_not_submitted_twice(cluster: Lab, script: Path):
    controller = next(
        process
        for process in psutil.Process(cluster.state.processes["ctl"].pid).children(recursive=True)
        if process.name() == "slurmctld"
    )
    token = commands.new_token()
    controller.suspend()
    # sbatch gives up after MessageTimeout, 5 s here; its request lies in the controller's socket.
    timer = threading.Timer(6.5, controller.resume)
    timer.start()
    try:
        job = commands.submit(script, token=token)
    finally:
        timer.join()
    alive = commands.squeue("--me", "--states=pending,running", "--format=%i|%k").split()
    assert alive == [f"{job}|{token}"]
    assert commands.find(token) == job
    assert commands.find(commands.new_token()) is None


def test_slurm_s_refusals_say_what_to_do(cluster: Lab, script: Path):
    for option, words, remedy in (
        ("--partition=nope", "Invalid partition name specified", "sinfo"),
        ("--account=nobody", "Invalid account or account/partition", "slurm.account"),
        ("--gpus-per-node=9", "Requested node configuration is not available", "sinfo --Node --long"),
        ("--constraint=mist", "Invalid feature specification", "constraint"),
        ("--no-such-option", "unrecognized option", "null"),
    ):
        with pytest.raises(commands.SlurmRefused, match=words) as refused:
            commands.check(script, [option])
        assert remedy in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(commands.SlurmRefused, match=r"Invalid account.*slurm\.account"):
        commands.submit(script, ["--account=nobody"])
    assert commands.squeue("--me") == ""
    assert "to start at" in commands.check(script)


def test_jobs_that_slurm_has_forgotten_are_no_error(cluster: Lab):
    assert commands.squeue("--jobs=99999999") == ""
    commands.scancel("99999999")
    assert commands.sacct("--jobs=99999999", "--noheader") == ""


def test_a_controller_that_does_not_come_back_is_named(cluster: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    text = (cluster.folder / "slurm.conf").read_text()
    (tmp_path / "slurm.conf").write_text(text.replace("MessageTimeout=5", "MessageTimeout=1") + "SlurmctldPort=1\n")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
        with pytest.raises(commands.SlurmError, match=r"did not answer `squeue` for 1 s: .*try again later") as error:
            commands.squeue(deadline_s=1)
    assert error.value.passing


def test_a_machine_without_slurm_is_told_so(monkeypatch: pytest.MonkeyPatch, script: Path):
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", str(script.parent))
        with pytest.raises(UserError, match=r"^no Slurm here: `sbatch` is not in PATH; .*`specbatch run`"):
            commands.check(script)


def test_a_machine_without_a_cluster_is_told_so(monkeypatch: pytest.MonkeyPatch, script: Path):
    with monkeypatch.context() as elsewhere:
        elsewhere.delenv("SLURM_CONF", raising=False)
        with pytest.raises(UserError, match=r"^no cluster here: `sbatch` is installed, .*`specbatch run`"):
            commands.check(script)

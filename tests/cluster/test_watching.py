"""Commands for jobs in a real queue: status, cancel, scale."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from specbatch.config import dump_config, load_config
from specbatch.errors import UserError
from specbatch.run.attempts import begin_attempt
from specbatch.run.cancel import cancel
from specbatch.run.run_status import RunStatus, read_files, run_status
from specbatch.rundir import RunDir
from specbatch.slurm import commands, scale
from specbatch.slurm.jobs import read_jobs, record_job
from specbatch.slurm.query import SlurmJobs, query_job, query_jobs
from specbatch.slurm.submit import resume
from tools.lab import Lab

pytestmark = [pytest.mark.light, pytest.mark.timeout(180)]

HET = """#!/bin/bash
#SBATCH --partition=cpu --nodes=1 --time=5 --output=/dev/null
#SBATCH hetjob
#SBATCH --partition=cpu --nodes=1 --time=5
#SBATCH hetjob
#SBATCH --partition=cpu --nodes=1 --time=5
srun --het-group=0-2 sleep 240
"""
ENGINES = "#!/bin/bash\n#SBATCH --partition=cpu --nodes=1 --time=5 --output=/dev/null\nsleep 240\n"


@pytest.fixture
def cluster(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_CONF", str(lab.folder / "slurm.conf"))
    yield lab
    commands.scancel("--me")


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "it's a run")
    run_dir.root.mkdir()
    run_dir.config.write_text("run:\n  dir: x\n")
    return run_dir


def submit(run_dir: RunDir, text: str, *options: str) -> int:
    script = run_dir.root / "job.sbatch"
    script.write_text(text)
    return commands.submit(script, options)


def asked(run_dir: RunDir) -> SlurmJobs:
    return query_jobs((job.id for job in read_jobs(run_dir)), {run_dir.root.stat().st_uid})


def stand(run_dir: RunDir) -> RunStatus:
    return run_status(read_files(run_dir), asked(run_dir), time.time())


def wait_until(true: Callable[[], bool], timeout_s: float = 40) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_a_job_is_seen_from_the_queue_to_its_cancellation(cluster: Lab, run_dir: RunDir):
    job = submit(run_dir, HET, "--begin=now+1hour")
    record_job(run_dir, job, size=3)
    assert (stand(run_dir).state, stand(run_dir).why.split(":")[0]) == ("pending", "BeginTime")
    commands.scontrol("update", f"JobId={job}", "StartTime=now")
    wait_until(lambda: stand(run_dir).state == "starting")
    begin_attempt(run_dir, 1, job=job)
    assert [row.partition for row in asked(run_dir).alive(job)] == ["cpu"] * 3
    wait_until(lambda: (stand(run_dir).used_s or 0) >= 1)
    assert 0 < stand(run_dir).left_s < 300
    successor = submit(run_dir, HET, f"--dependency=afternotok:{job}")
    record_job(run_dir, successor, size=3, after=job)
    assert stand(run_dir).job == job
    # Its head has published nothing, so there is nothing to save.
    said = cancel(run_dir, at_once=False)
    assert said == f"job {successor} is cancelled; job {job} ends at once"
    assert run_dir.cancelled.exists()
    wait_until(lambda: not asked(run_dir).alive(job))
    assert asked(run_dir).alive(successor) == []
    assert stand(run_dir).state == "cancelled"
    # What squeue has forgotten is in the accounts, and so are the node-hours; scontrol knows the restarts.
    wait_until(lambda: len(asked(run_dir).past.get(job, [])) == 3)
    past = SlurmJobs({}, asked(run_dir).past)
    assert past.state(job, 3).word == "CANCELLED"
    assert stand(run_dir).node_hours > 0
    assert [row.restarts for row in query_job(job)] == [0, 0, 0]


def test_a_job_that_would_wait_for_ever_is_called_stuck_and_is_brought_back(cluster: Lab, run_dir: RunDir):
    job = submit(run_dir, HET, "--requeue")
    record_job(run_dir, job, size=3)
    wait_until(lambda: stand(run_dir).state == "starting")
    lost = next(row.nodes for row in asked(run_dir).alive(job) if row.index == 1)
    cluster.kill_node(lost)
    try:
        # Slurm queues the components up to the lost one again, and forgets those after it.
        wait_until(lambda: stand(run_dir).state == "stuck", 60)
        assert "it will never start by itself" in stand(run_dir).why
        assert resume(run_dir, [], print) == job
        wait_until(lambda: [row.state for row in asked(run_dir).alive(job)] == ["RUNNING"] * 3, 60)
    finally:
        cluster.restore_node(lost)


def test_a_slurm_that_does_not_answer_is_not_waited_for(cluster: Lab, run_dir: RunDir):
    record_job(run_dir, submit(run_dir, HET, "--hold"), size=3)
    controller = next(
        process
        for process in psutil.Process(cluster.state.processes["ctl"].pid).children(recursive=True)
        if process.name() == "slurmctld"
    )
    controller.suspend()
    try:
        began = time.monotonic()
        answer = asked(run_dir)
        took = time.monotonic() - began
    finally:
        controller.resume()
    assert answer.problem == "squeue did not answer within 2 s"
    assert took < 4
    assert run_status(read_files(run_dir), answer, time.time()).state == "pending"


def test_an_added_engine_that_is_preempted_comes_back_and_one_that_is_taken_away_does_not(cluster: Lab, tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"run: {{dir: {json.dumps(str(tmp_path / 'it is a $(run) %j'))}}}\ntarget: {{path: nowhere}}\n"
        "data: {train: [none.jsonl]}\nslurm: {partition: cpu, time: '5', gpus: none}\n"
    )
    loaded = load_config(config)
    run_dir = RunDir(Path(loaded.run.dir))
    run_dir.root.mkdir()
    run_dir.config.write_text(dump_config(loaded))
    run_dir.corpus.write_text("{}")
    record_job(run_dir, submit(run_dir, HET, "--hold"), size=3)
    said = scale.add(run_dir, 2, ["--partition=preempt", "--exclusive"])
    job = int(re.match(r"job (\d+): 2 more engines", said)[1])
    log = run_dir.root / "engines.log"

    def joined() -> list[str]:
        return re.findall(rf"added-{job}-(\d) on (\w+) joins", log.read_text() if log.exists() else "")

    wait_until(lambda: len(joined()) == 2, 90)
    # The element that has the array's own id is the delicate one.
    element, node = max(joined())
    cluster.preempt(node, seconds=3)
    # It leaves at once, within the time that preemption gives it, and is queued again; the other one stays.
    wait_until(lambda: len(joined()) == 3, 90)
    assert joined()[-1][0] == element
    assert log.read_text().count("the engine ended: signal SIG") == 1
    assert [row.partition for row in asked(run_dir).alive(job)] == ["preempt"] * 2
    assert scale.remove(run_dir, 2).startswith("2 added engines leave: ")
    wait_until(lambda: not asked(run_dir).alive(job))
    assert log.read_text().count("the engine ended: signal SIG") == 3
    # Where the site takes no arrays, each is a job.
    loaded.slurm.forbidden = {"array": "no arrays", "qos": {"debug": "no chains"}}
    run_dir.config.write_text(dump_config(loaded))
    said = scale.add(run_dir, 2, ["--hold"])
    first, second = re.match(r"jobs (\d+), (\d+): 2 more engines", said).groups()
    assert {row.index for number in (first, second) for row in asked(run_dir).alive(int(number))} == {0}
    with pytest.raises(UserError, match=r"requests --qos=debug, which is forbidden here: no chains; choose another"):
        scale.add(run_dir, 1, ["--qos=debug"])
    assert scale.remove(run_dir, 2).startswith("2 added engines leave: ")


def test_added_engines_are_taken_away_one_by_one_those_first_that_wait(cluster: Lab, run_dir: RunDir):
    array = submit(run_dir, ENGINES, "--array=0-1")
    record_job(run_dir, array, kind="engines", size=2)
    waits = submit(run_dir, ENGINES, "--hold")
    record_job(run_dir, waits, kind="engines")
    wait_until(lambda: [row.state for row in asked(run_dir).alive(array)] == ["RUNNING"] * 2)
    assert scale.remove(run_dir, 1) == f"1 added engines leave: {waits}"
    assert scale.remove(run_dir, 1).startswith(f"1 added engines leave: {array}_")
    wait_until(lambda: len(asked(run_dir).alive(array)) == 1)
    assert scale.remove(run_dir, 5).endswith("; there were only 1")
    wait_until(lambda: not asked(run_dir).alive(array))

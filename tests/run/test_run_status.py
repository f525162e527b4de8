"""The state of a run, from its files and Slurm's answer."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specbatch.run.attempts import begin_attempt
from specbatch.run.exit_records import ExitRecord, write_exit_record
from specbatch.run.run_status import read_files, run_status
from specbatch.run.status_details import attempts, components, failure
from specbatch.rundir import RunDir, write_json
from specbatch.slurm.jobs import record_job
from specbatch.slurm.query import SlurmJobs
from specbatch.slurm.states import parse_sacct, parse_squeue

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "slurm-22.05.8"


def new_run(root: Path, name: str = "''") -> RunDir:
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(f"run:\n  dir: {root}\n  name: {name}\n  seed: 0\ntarget:\n  name: not this\n")
    return RunDir(root)


def head(
    run_dir: RunDir, attempt: int, state: str = "running", why: str = "", step: int = 12, age_s: float = 0.0
) -> None:
    """Write a head's status."""
    updated = datetime.datetime.fromtimestamp(time.time() - age_s, datetime.UTC).isoformat()
    engine = {
        "name": "engine-0-ab",
        "state": "ready",
        "claims": 1,
        "packs": 9,
        "tokens_per_s": 5.0,
        "last_heard_s": 0.1,
    }
    write_json(
        run_dir.status,
        {
            "state": state, "stage": "training", "step": step, "steps": 40, "attempt": attempt, "why": why, "ranks": 2,
            "updated": updated, "engines": [engine], "waiting": ["rank 0 waits for pack 0.7"], "void": [],
            "store": {"stored_bytes": 1 << 29, "budget_bytes": 1 << 30},
            "window": {"free": 1, "claimed": 2, "stored": 3},
        },
    )  # fmt: skip


def recorded(command: str, situation: str) -> str:
    return (RECORDED / f"{command}.{situation}.txt").read_text().replace("2026-11-25", "2016-11-25")


def slurm(situation: str, problem: str = "") -> SlurmJobs:
    """A recorded answer, of long ago whatever the clock of this machine says."""
    queue = parse_squeue(recorded("squeue", situation))
    past = parse_sacct(recorded("sacct", situation))
    by_job = [{row.job: [other for other in rows if other.job == row.job] for row in rows} for rows in (queue, past)]
    return SlurmJobs(*by_job, problem)


def stand(run_dir: RunDir, answer: SlurmJobs | None = None):
    return run_status(read_files(run_dir), answer or SlurmJobs(), time.time())


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    return new_run(tmp_path / "run")


def test_a_run_that_nobody_started_is_new(run_dir):
    found = stand(run_dir)
    assert (found.state, found.name, found.attempt, found.job) == ("new", "run", 0, 0)
    assert (found.loss, found.used_s, found.node_hours) == (None, None, None)


@pytest.mark.parametrize(("written", "shown"), [("''", "run"), ("kimi", "kimi"), ("'1e3'", "1e3")])
def test_a_run_has_its_name_and_else_its_directorys(tmp_path, written, shown):
    assert stand(new_run(tmp_path / "run", written)).name == shown


def test_a_local_run_is_what_its_head_says_while_its_process_lives(run_dir):
    begin_attempt(run_dir, 1)
    assert stand(run_dir).state == "starting"
    head(run_dir, 1)
    rows = [{"step": n, "loss": 3.0 - n / 10, "tokens": 100, "seconds": 2.0} for n in range(1, 13)]
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 13, "lo')
    found = stand(run_dir)
    assert (found.state, found.stage, found.step, found.steps) == ("running", "training", 12, 40)
    assert (found.tokens_per_s, round(found.loss, 3), found.to_go_s, found.engines) == (50.0, 1.8, 56.0, 1)


def squeue(*rows: tuple[str, str, str, str]) -> SlurmJobs:
    """Return Slurm's answer: id, state, reason, start."""
    text = "".join(
        f"{shown}|{shown.split('+')[0]}|{state}|{reason}|(x)|0:00|1:00:00|{start}|N/A|gpu|1|2026-01-01T10:00:00|n\n"
        for shown, state, reason, start in rows
    )
    found: dict = {}
    for row in parse_squeue(text):
        found.setdefault(row.job, []).append(row)
    return SlurmJobs(found)


def test_a_failure_that_another_job_goes_on_from_is_no_end(run_dir):
    record_job(run_dir, 7)
    record_job(run_dir, 8, after=7)
    begin_attempt(run_dir, 1, job=7)
    head(run_dir, 1, "failed", "the store's master died")
    waits = ("8", "PENDING", "Dependency", "N/A")
    found = stand(run_dir, squeue(("7", "RUNNING", "None", "2016-01-01T10:00:00"), waits))
    assert (found.state, found.why) == ("stopping", "the store's master died; it will be retried in job 8")
    found = stand(run_dir, squeue(("7", "FAILED", "None", "2016-01-01T10:00:00"), waits))
    assert (found.state, found.job) == ("pending", 8)
    assert found.why.startswith("will be retried in job 8: attempt 1 failed: the store's master died; Dependency")
    # The head's own record says that no attempt would do better: its job calls the successor off.
    write_exit_record(run_dir, 1, ExitRecord("head", 0, "no such interface"))
    found = stand(run_dir, squeue(("7", "RUNNING", "None", "2016-01-01T10:00:00"), waits))
    assert (found.state, found.why) == ("failed", "the store's master died")


def test_a_queued_job_says_when_slurm_expects_it_to_start(run_dir):
    record_job(run_dir, 7, size=2)
    rows = [(f"7+{i}", "PENDING", "Resources", f"2036-01-01T10:0{i}:00") for i in range(2)]
    found = stand(run_dir, squeue(*rows))
    assert found.why == "Resources: it waits for nodes; Slurm expects it to start at 2036-01-01 10:01"


def test_what_the_job_printed_is_quoted_where_no_component_left_a_log(run_dir):
    record_job(run_dir, 7)
    (run_dir.root / "job.log").write_text("/no/python: No such file or directory\n")
    found = stand(run_dir, squeue(("7", "FAILED", "NonZeroExitCode", "2016-01-01T10:00:00")))
    assert found.state == "failed"
    assert failure(read_files(run_dir), found).lines == ["/no/python: No such file or directory"]


def test_a_local_run_whose_process_died_is_gone_and_not_running(run_dir):
    code = "import sys, pathlib, specbatch.run.attempts as h; h.begin_attempt(h.RunDir(pathlib.Path(sys.argv[1])), 1)"
    subprocess.run([sys.executable, "-c", code, str(run_dir.root)], check=True)
    head(run_dir, 1)
    assert stand(run_dir).state == "gone"
    assert failure(read_files(run_dir), stand(run_dir)).component == "head-0"


def test_what_its_user_cancelled_is_cancelled_and_what_is_complete_is_complete(run_dir):
    begin_attempt(run_dir, 1)
    head(run_dir, 1, "stopped", "signal SIGTERM")
    assert stand(run_dir).state == "stopped"
    write_json(run_dir.cancelled, {})
    assert stand(run_dir).state == "cancelled"
    head(run_dir, 1, "completed", step=40)
    assert stand(run_dir).state == "completed"


def test_a_job_that_waits_is_pending_and_says_why(run_dir):
    record_job(run_dir, 162, size=3)
    found = stand(run_dir, slurm("PENDING"))
    assert (found.state, found.job) == ("pending", 162)
    assert "end of another job" in found.why
    write_json(run_dir.cancelled, {})
    assert stand(run_dir, slurm("PENDING")).state == "cancelled"


def test_a_job_that_runs_is_starting_until_its_head_speaks(run_dir):
    record_job(run_dir, 4, size=3)
    assert stand(run_dir, slurm("RUNNING")).state == "starting"
    begin_attempt(run_dir, 1, job=4, nodes={"head": ["node1"], "training": ["node4", "node5"]})
    head(run_dir, 1)
    found = stand(run_dir, slurm("RUNNING"))
    assert (found.state, found.used_s, found.left_s) == ("running", 39.0, 81.0)
    assert round(found.node_hours, 4) == round(39 * 4 / 3600, 4)
    shown = components(read_files(run_dir), slurm("RUNNING"))
    assert [(part.name, part.nodes, part.partition) for part in shown] == [
        ("head", "node1", "cpu"),
        ("inference", "node3", "gpu"),
        ("training", "node[4-5]", "gpu"),
    ]


def test_node_hours_are_those_of_all_attempts(run_dir):
    record_job(run_dir, 1, size=3)
    found = stand(run_dir, slurm("REQUEUED"))
    assert round(found.node_hours, 4) == round((14 + 11) * 4 / 3600, 4)


def test_where_there_are_no_accounts_node_hours_are_those_that_attempts_wrote_down(run_dir):
    record_job(run_dir, 4, size=3)
    attempt = begin_attempt(run_dir, 1, job=4, nodes={"head": ["a"], "inference": ["b", "c"], "training": ["a"]})
    head(run_dir, 1, age_s=-3600)
    files = read_files(run_dir)
    found = run_status(files, SlurmJobs(slurm("RUNNING").queue), attempt.began + 1800)
    assert round(found.node_hours, 3) == 0.5 * 3


def test_the_history_says_what_slurm_did_to_each_attempt(run_dir):
    record_job(run_dir, 1, size=3)
    begin_attempt(run_dir, 1, job=1)
    head(run_dir, 1, step=7)
    begin_attempt(run_dir, 2, job=1, restart=1)
    head(run_dir, 2, step=9)
    answer = slurm("REQUEUED")
    files = read_files(run_dir)
    first, second = attempts(files, answer, stand(run_dir, answer))
    assert (first.number, first.state, first.step, first.why) == (1, "killed", 7, "PREEMPTED: it was preempted")
    assert (second.number, second.step, second.restart, second.ended) == (2, 9, 1, None)


def test_a_job_that_ended_without_a_word_from_its_head_failed_and_slurm_says_why(run_dir):
    record_job(run_dir, 4, size=3)
    begin_attempt(run_dir, 1, job=4)
    head(run_dir, 1)
    found = stand(run_dir, slurm("TIMEOUT"))
    assert (found.state, found.why) == ("failed", "job 4: TIMEOUT: it reached its time limit")
    record_job(run_dir, 53, size=3)
    assert stand(run_dir, slurm("CANCELLED")).state == "cancelled"


def test_a_job_that_lost_a_component_is_stuck(run_dir):
    record_job(run_dir, 56, size=3)
    for answer in (slurm("NODE_FAIL_component1"), SlurmJobs({}, slurm("NODE_FAIL_component1").past)):
        found = stand(run_dir, answer)
        assert found.state == "stuck"
        assert "scontrol requeue 56" in found.why


def test_a_successor_that_waits_counts_as_soon_as_the_job_before_it_is_over(run_dir):
    record_job(run_dir, 10, size=3)
    begin_attempt(run_dir, 1, job=10)
    head(run_dir, 1, "stopped", "preempted")
    record_job(run_dir, 162, size=3, after=10)
    answer = SlurmJobs(slurm("PENDING").queue, slurm("PREEMPTED_CANCELLED").past)
    found = stand(run_dir, answer)
    assert (found.state, found.job) == ("pending", 162)
    # While the first one runs, it is the run, although the other one is queued, too.
    answer = SlurmJobs({**slurm("PENDING").queue, 10: slurm("RUNNING").queue[4]}, {})
    assert stand(run_dir, answer).job == 10


def test_a_run_that_ended_ran_in_the_job_of_its_last_attempt_not_in_the_successor_that_was_called_off(run_dir):
    record_job(run_dir, 7)
    record_job(run_dir, 8, after=7)
    begin_attempt(run_dir, 1, job=7)
    over = squeue(("7", "COMPLETED", "None", "2016-01-01T10:00:00"), ("8", "CANCELLED", "None", "N/A"))
    for state in ("completed", "stopped", "failed"):
        head(run_dir, 1, state)
        assert (stand(run_dir, over).state, stand(run_dir, over).job) == (state, 7)


def test_a_component_that_waits_for_another_job_is_told_from_the_one_that_runs(run_dir):
    record_job(run_dir, 7, size=2)
    record_job(run_dir, 8, size=2, after=7)
    both = [(f"{job}+{part}", state) for job, state in ((7, "RUNNING"), (8, "PENDING")) for part in (0, 1)]
    answer = squeue(*((shown, state, "None", "2016-01-01T10:00:00") for shown, state in both))

    def names() -> list[str]:
        return [part.name for part in components(read_files(run_dir), answer)]

    waits = "continues when job 7 ends"
    assert names() == ["head and training", "inference", f"{waits} (head and training)", f"{waits} (inference)"]
    run_dir.config.write_text("run:\n  goal: answers\n")
    assert names() == ["head", "inference", f"{waits} (head)", f"{waits} (inference)"]


def test_without_slurms_answer_the_files_speak(run_dir):
    record_job(run_dir, 4, size=3)
    silent = SlurmJobs(problem="squeue did not answer within 2 s")
    assert stand(run_dir, silent).state == "pending"
    begin_attempt(run_dir, 1, job=4, nodes={"head": ["a"], "inference": ["b", "c"]})
    head(run_dir, 1)
    assert stand(run_dir, silent).state == "running"


def test_a_job_that_slurm_has_forgotten_is_gone_unless_its_head_still_speaks(run_dir):
    record_job(run_dir, 4, size=3)
    assert stand(run_dir).state == "pending"
    begin_attempt(run_dir, 1, job=4)
    head(run_dir, 1)
    assert stand(run_dir).state == "running"
    head(run_dir, 1, age_s=600)
    assert stand(run_dir).state == "gone"
    head(run_dir, 1, "failed", "training: out of memory", age_s=600)
    assert (stand(run_dir).state, stand(run_dir).why) == ("failed", "training: out of memory")


def test_a_requeued_job_starts_anew_until_its_new_head_speaks(run_dir):
    record_job(run_dir, 4, size=3)
    begin_attempt(run_dir, 1, job=4)
    head(run_dir, 1, "stopped", "preempted")
    restarted = recorded("squeue", "RUNNING")
    soon = datetime.datetime.fromtimestamp(time.time() + 60).isoformat(timespec="seconds")
    rows = parse_squeue(restarted.replace("2016-11-25T01:22:15", soon))
    assert stand(run_dir, SlurmJobs({4: rows})).state == "starting"
    # It began before Slurm started its job, by the clock of its node, and has written since.
    head(run_dir, 1, "running", age_s=-65)
    assert stand(run_dir, SlurmJobs({4: rows})).state == "running"


def test_a_failed_run_says_which_component_and_shows_the_end_of_its_log(run_dir):
    begin_attempt(run_dir, 1)
    log = run_dir.component_log(1, "training", 0)
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    write_exit_record(run_dir, 1, ExitRecord("training", 0, "rank 1 was killed\nmore"))
    write_exit_record(run_dir, 1, ExitRecord("inference", 0))
    write_exit_record(run_dir, 1, ExitRecord("head", 0, "training: rank 1 was killed\nmore"))
    head(run_dir, 1, "failed", "training: rank 1 was killed")
    broken = failure(read_files(run_dir), stand(run_dir))
    assert (broken.component, broken.why, broken.lines[-1]) == ("training-0", "rank 1 was killed", "line 99")
    assert broken.log == str(log)

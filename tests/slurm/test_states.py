"""The meaning of Slurm's outputs for a run's job; see tests/recorded/README.md for their origin."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.slurm.states import (
    SACCT_FIELDS,
    Condition,
    job_state,
    newest,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
)

RECORDED = Path(__file__).resolve().parents[1] / "recorded"
PARSERS = {"squeue": parse_squeue, "sacct": parse_sacct, "scontrol": parse_scontrol}


def rows(version: str, command: str, situation: str):
    return PARSERS[command]((RECORDED / version / f"{command}.{situation}.txt").read_text())


def state(command: str, situation: str, version: str = "slurm-22.05.8", size: int = 3):
    return job_state(rows(version, command, situation), size)


@pytest.mark.parametrize(
    ("situation", "commands", "condition", "words"),
    [
        ("PENDING", "squeue scontrol", Condition.PENDING, "Dependency: it waits for the end of another job"),
        ("RUNNING", "squeue sacct scontrol", Condition.RUNNING, ""),
        ("REQUEUED", "squeue sacct scontrol", Condition.RUNNING, ""),
        ("COMPLETED", "sacct scontrol", Condition.OVER, "COMPLETED: its script ended"),
        ("FAILED", "sacct scontrol", Condition.OVER, "FAILED: its script failed with exit code 3"),
        ("TIMEOUT", "sacct scontrol", Condition.OVER, "TIMEOUT: it reached its time limit"),
        ("CANCELLED", "scontrol", Condition.OVER, "CANCELLED: it was cancelled"),
        ("CANCELLED", "sacct", Condition.OVER, "CANCELLED: it was cancelled by user 0"),
        ("PREEMPTED_CANCELLED", "sacct scontrol", Condition.OVER, "PREEMPTED: it was preempted"),
        ("PENDING_after_preemption", "scontrol", Condition.PENDING, ""),
        (
            "PENDING_after_preemption",
            "squeue",
            Condition.PENDING,
            "BeginTime: Slurm waits a while before it restarts a requeued job; "
            "Slurm expects it to start at 2026-11-25 01:39",
        ),
    ],
)
def test_a_job_stands_as_its_leader_does(situation, commands, condition, words):
    for command in commands.split():
        found = state(command, situation)
        assert (found.condition, found.why) == (condition, words), command


@pytest.mark.parametrize("command", ["squeue", "sacct", "scontrol"])
def test_a_lost_component_makes_a_pending_job_stuck(command):
    found = state(command, "NODE_FAIL_component1")
    assert found.condition is Condition.STUCK
    assert found.word == "PENDING"
    assert "scontrol requeue 56" in found.why
    assert ("1 of its 3 components" if command == "squeue" else "component 2 on node[9-10] is FAILED") in found.why


@pytest.mark.parametrize("command", ["squeue", "sacct", "scontrol"])
def test_a_head_that_waits_alone_is_pending_and_not_stuck(command):
    found = state(command, "NODE_FAIL_head")
    assert found.condition is Condition.PENDING
    assert "component 1, 2 still exists" in found.why
    assert "requeue" not in found.why.split(";")[-1]


def test_a_job_that_slurm_has_forgotten_is_none():
    for situation in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "PREEMPTED_CANCELLED"):
        assert state("squeue", situation) is None
    assert state("sacct", "PENDING") is None


def test_a_job_that_is_being_requeued_is_ending():
    found = state("squeue", "COMPLETING_partly", "slurm-23.11-written")
    assert (found.condition, found.word) == (Condition.ENDING, "COMPLETING")


def test_reasons_are_told_by_component_where_they_differ():
    found = state("squeue", "PENDING_reasons", "slurm-23.11-written")
    assert found.condition is Condition.PENDING
    assert found.why == (
        "component 1 ReqNodeNotAvail, UnavailableNodes:gpu[01-04]: nodes that it needs are down, drained or reserved; "
        "component 2 QOSMaxGRESPerUser: your limit of GPUs at a time"
    )


def test_names_of_jobs_that_look_like_fields_are_names():
    found = state("scontrol", "NODE_FAIL_requeued", "slurm-23.11-written", size=2)
    assert (found.condition, found.word) == (Condition.PENDING, "PENDING")
    leader, engines = found.rows
    assert (leader.restarts, leader.limit_s, leader.reason, leader.nodes) == (2, 86400.0, "BeginTime", "")
    assert (engines.node_count, engines.partition, engines.started) == (16, "gpu", None)


def test_what_killed_a_plain_job_is_told():
    found = state("scontrol", "FAILED_plain", "slurm-24.05-written", size=1)
    assert found.why == "FAILED: its script failed, killed by signal 9"
    assert found.leader.nodes == "gpu[01-02]"
    assert (found.leader.used_s, found.leader.limit_s, found.leader.node_count) == (508.0, None, 2)


def test_a_component_that_ended_otherwise_than_the_leader_is_named():
    found = state("sacct", "OUT_OF_MEMORY", "slurm-24.05-written", size=2)
    assert found.why == "FAILED: its script failed with exit code 1; component 1 on gpu[01-16] is OUT_OF_MEMORY"


def test_elements_of_an_array_are_told_apart():
    found = rows("slurm-24.05-written", "squeue", "engines_array")
    assert [(row.job, row.index, row.id, row.state) for row in found] == [
        (9001, 0, 9003, "RUNNING"),
        (9001, 1, 9004, "RESIZING"),
        (9001, 2, 9001, "PENDING"),
    ]
    assert not any(row.over for row in found)


def test_of_several_attempts_the_newest_counts_and_all_are_told():
    found = rows("slurm-22.05.8", "sacct", "REQUEUED")
    assert [row.state for row in found if row.index == 0] == ["PREEMPTED", "RUNNING"]
    assert sum(row.used_s * row.node_count for row in found) == (14 + 11) * 4
    assert [row.state for row in newest(found)] == ["RUNNING"] * 3
    assert newest(found)[2].nodes == "node[8-9]"


def test_times_are_seconds():
    row = rows("slurm-22.05.8", "squeue", "RUNNING")[2]
    assert (row.used_s, row.limit_s, row.started - row.submitted) == (39.0, 120.0, 1.0)
    row = rows("slurm-24.05-written", "sacct", "OUT_OF_MEMORY")[0]
    assert (row.used_s, row.limit_s) == (88200.0, 172800.0)


def test_rows_of_steps_and_lines_that_are_none_are_passed_over():
    steps = "JobID|JobIDRaw|State\n4+0|4|RUNNING\n4+0.batch|4.batch|RUNNING\n4+1.2|5.2|RUNNING\n"
    assert [row.id for row in parse_sacct(steps)] == [4]
    assert parse_squeue("slurm_load_jobs error: Unable to contact slurm controller\n") == []
    assert parse_scontrol("slurm_load_jobs error: Invalid job id specified\n") == []
    assert parse_sacct("") == []


def test_what_is_asked_for_is_what_is_read():
    header = (RECORDED / "slurm-24.05-written" / "sacct.OUT_OF_MEMORY.txt").read_text().splitlines()[0]
    assert header.startswith(SACCT_FIELDS.replace(",", "|"))

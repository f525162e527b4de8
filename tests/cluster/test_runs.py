"""Runs on a cluster that does to them what clusters do: each ends by itself, and nothing of its training is changed.

All runs are played side by side, since most of a disturbed run's time is spent waiting for Slurm; two of them are
disturbed on nodes of their own, the others share nodes. Each test then looks at one of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specbatch.slurm.jobs import read_jobs
from tests.cluster.containers import PYTHON, make_image
from tests.cluster.runs import STEPS, ByHand, Foreground, Local, Run, play
from tests.smalltalk import write_smalltalk
from tests.tiny_target import make_tiny_target
from tools.bench.recovery import recoveries
from tools.lab import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = "time: '30', signal_s: 60, head: {mem: 1G}, training: {mem: 4G}, inference: {mem: 4G}"
AFTER_OTHERS = 'setup: [\'until [ -e go -o "$SLURM_ARRAY_JOB_ID" -o -z "$SPECBATCH_STARTS" ]; do sleep 0.2; done\']'
"""A run's own engine is to start when another one, of an array, has joined and worked; the look at its node before that
waits for nothing."""
UNDISTURBED = "undisturbed"
TWO_RANKS = "two ranks of one node"
ODD = 'it\'s a "run" $(id) %j'
PLAY_S, AT_ONCE = 1500.0, 4
Events = Iterator[Callable[[], bool]]
"""Conditions that have to become true before the next event."""


def undisturbed_to_its_end(run: Run) -> Events:
    """Do nothing."""
    yield run.ended


def without_warning(run: Run) -> Events:
    """A job of higher priority takes the engine's node, the training node loses its power, the head's its network."""
    yield run.reaches(5)
    run.lab.preempt(run.node("inference"), seconds=1)
    yield run.reaches(12)
    run.lab.kill_node(run.node("training"))
    yield run.reaches(19)
    # It goes on without a network, and can write to the run's directory.
    run.lab.cut_node(run.node("head"))
    yield run.ended


def with_warning(run: Run) -> Events:
    """A job of higher priority takes the engine's node, and the training node, with the head, loses its network."""
    yield run.reaches(5)
    run.lab.preempt(run.node("inference"), seconds=1)
    yield run.reaches(12)
    run.lab.cut_node(run.node("training"))
    yield run.ended


def requeued(run: Run) -> Events:
    """The same warning, and the head's node lost."""
    yield run.reaches(5)
    run.lab.preempt(run.node("inference"), seconds=1)
    yield run.reaches(12)
    run.lab.kill_node(run.node("head"))
    yield run.ended


def engine_over_two_nodes(run: Run) -> Events:
    """The second node of its engine is lost, which Slurm does not come back from by itself."""
    yield run.reaches(5)
    run.lab.kill_node(run.attempt().nodes["inference"][1])
    yield run.ended


def engine_added_and_preempted(run: Run) -> Events:
    """An engine joins from a preemptible node, works, and has to go; nothing happens to the run itself."""
    yield run.prepared
    # On a separate node, since otherwise nothing would make room for the job that preempts it.
    where = ["--partition=sudden", "--exclude=node[1-21,23-27]"]
    yield run.doing("scale", str(run.run_dir.root), "--engines", "+1", *where, "--mem=4G", "--time=20")
    yield run.added_works
    run.lab.preempt(run.added_node(), seconds=1)
    run.let_own_engine_start()
    yield run.ended


def time_limit_and_its_users_will(run: Run) -> Events:
    """Slurm ends the job at its time limit; its user cancels the next one, later the run, and goes on each time."""
    yield run.reaches(5)
    # Slurm looks at limits twice a minute, and the signal that it sends lets stopped processes go on. With less time
    # than that left, it would send the warning and the end together.
    run.stop_engine()
    used = run.lab.run("squeue", "--noheader", f"--jobs={run.attempt().job}", "--format=%M").split(":")
    limit = int(used[-2]) + (2 if int(used[-1]) > 25 else 1)
    run.lab.run("scontrol", "update", f"JobId={run.attempt().job}", f"TimeLimit={limit}")
    # How far the first attempt came depends on what its engine had in hand.
    yield lambda: 2 in run.first_steps()
    run.user("scancel", str(run.attempt().job))
    yield run.ended
    assert run.state() == "cancelled"
    yield run.doing("resume", str(run.run_dir.root))
    yield run.reaches(19)
    reached = run.step()
    yield run.doing("cancel", str(run.run_dir.root))
    yield run.ended
    assert run.state() == "cancelled"
    # It was drained: the snapshot is that of the last step.
    assert run.snapshots()[-1] == run.step() >= reached
    yield run.doing("resume", str(run.run_dir.root))
    yield run.ended


def engine_by_hand(run: ByHand) -> Events:
    """An engine joins that was started with the template."""
    yield run.prepared
    run.submit_engine()
    yield run.added_works
    run.let_own_engine_start()
    yield run.ended


def on_nodes_that_are_there(run: Foreground) -> Events:
    """Ctrl-C stops it with a snapshot, it goes on in an allocation of one node, where Ctrl-C stops it as it starts, and
    then in one of two nodes."""
    yield run.reaches(5)
    run.interrupt()
    yield run.ended
    assert run.process.returncode == 75, run
    run.on_nodes(1, "resume", str(run.run_dir.root))
    yield lambda: bool(run.leader(2)) or run.ended()
    assert run.leader(2) in run.lab.state.names, run
    run.interrupt()
    yield run.ended
    assert run.process.returncode == 75, run
    run.on_nodes(2, "resume", str(run.run_dir.root))
    yield run.ended


@pytest.fixture(scope="module")
def folder(lab: Lab) -> Iterator[Path]:
    """Conversations and target, in a directory that all nodes see; all nodes are well again afterwards."""
    path = lab.state.home / "work"
    path.mkdir()
    write_smalltalk(path, 500, 20, 50)
    make_tiny_target(path / "tiny")
    for place in [path, *path.rglob("*")]:
        os.chown(place, lab.state.uid, lab.state.uid)
    yield path
    lab.restore_node(*lab.state.names)


def in_containers(folder: Path) -> str:
    """Settings of all components: each is in a container."""
    part = f"{{python: {PYTHON}, launch: {json.dumps(make_image(folder / 'image', folder))}}}"
    return ", ".join(f"{name}: {part}" for name in ("head", "inference", "training"))


@pytest.fixture(scope="module")
def played(lab: Lab, folder: Path) -> dict[str, Run]:
    """All stories, after their end, by the run's name. The longest ones begin."""

    def run(name: str, others: str, more: str, small: str = SMALL, engine: str = "") -> Run:
        return Run(lab, folder, name, f"{{{more}, extra: {{exclude: 'node[{others}]'}}, {small}}}", engine)

    stories = {
        run("sudden", "7-27", "partition: sudden, stage_target: /dev/shm"): without_warning,
        run("requeued", "1-12,19-27", "partition: preempt, recovery: requeue"): requeued,
        run("single", "1-18,22-27", "partition: cpu, layout: single"): time_limit_and_its_users_will,
        run(ODD, "1-18,22-27", "partition: cpu", f"{SMALL[:-1]}, {AFTER_OTHERS}}}"): engine_added_and_preempted,
        run("warned", "1-6,13-27", "partition: preempt, head_on: training"): with_warning,
        run(
            "two nodes",
            "1-22",
            "partition: preempt, recovery: requeue",
            SMALL.replace("inference: {", "inference: {nodes: 2, "),
            "tensor_parallel: 2, nodes_per_engine: 2",
        ): engine_over_two_nodes,
        Local(lab, folder, TWO_RANKS, engine="tensor_parallel: 2"): undisturbed_to_its_end,
        Local(lab, folder, UNDISTURBED): undisturbed_to_its_end,
        Foreground(lab, folder, "foreground", f"{{{in_containers(folder)}}}"): on_nodes_that_are_there,
        ByHand(lab, folder, "by hand", f"{{inference: {{{AFTER_OTHERS}}}}}"): engine_by_hand,
    }
    play(stories, PLAY_S, AT_ONCE)
    return {run.run_dir.root.name: run for run in stories}


@pytest.fixture(scope="module")
def undisturbed(played: dict[str, Run]) -> Run:
    """The same run on one machine, without Slurm."""
    return played[UNDISTURBED]


def assert_unchanged(run: Run, undisturbed: Run) -> None:
    assert not run.failure, run.failure
    assert run.status()["state"] == "completed", run
    assert [row[0] for row in run.numbers()] == [str(step) for step in range(1, STEPS + 1)]
    assert run.numbers() == undisturbed.numbers()
    assert run.draft() == undisturbed.draft()


def test_a_run_with_an_odd_name_and_an_added_engine_that_is_preempted_ends_as_without_slurm(lab, played, undisturbed):
    run = played[ODD]
    assert_unchanged(run, undisturbed)
    assert run.run_dir.attempts() == [1]
    nodes = run.attempt().nodes
    assert len({node for of_component in nodes.values() for node in of_component}) == 3
    # Slurm queued the engine again: it came back, or found the run at its end.
    engines = read_jobs(run.run_dir, "engines")[0].id
    ends = lab.run("sacct", "--duplicates", "--allocations", "--noheader", f"--jobs={engines}", "--format=State%20")
    assert ends.split()[0] in ("PREEMPTED", "REQUEUED")
    assert len(ends.split()) == 2


def test_sudden_preemption_a_lost_trainer_and_a_cut_head_change_nothing(played, undisturbed):
    run = played["sudden"]
    assert_unchanged(run, undisturbed)
    assert len(run.run_dir.attempts()) == 4


def test_engines_read_the_target_from_a_copy_on_their_node_that_is_gone_at_the_end(lab, played):
    run = played["sudden"]
    own = f"/dev/shm/specbatch-{lab.state.uid}"
    logs = {number: run.run_dir.component_log(number, "engine", 0).read_text() for number in run.run_dir.attempts()}
    assert all(f"--model-path={own}/" in log for log in logs.values() if log), run
    said = [run.run_dir.component_log(number, "inference", 0).read_text() for number in run.run_dir.attempts()]
    assert "the target is on this node seconds=" in said[0]
    assert f"from={run.folder / 'tiny'} to={own}/" in said[0]
    assert f"the copy of the target was removed path={own}/" in said[-1]


def test_preemption_with_warning_and_a_cut_trainer_change_nothing_of_a_run_of_two_components(played, undisturbed):
    run = played["warned"]
    assert_unchanged(run, undisturbed)
    assert len(run.run_dir.attempts()) == 3
    nodes = run.attempt().nodes
    assert nodes["head"] == nodes["training"] != nodes["inference"]
    # Who is warned loses nothing.
    assert run.first_steps()[2] == run.last_status(1).step + 1


def test_where_slurm_requeues_it_is_the_same_job_that_comes_back_each_time(played, undisturbed):
    run = played["requeued"]
    assert_unchanged(run, undisturbed)
    assert [run.attempt(number).restart for number in run.run_dir.attempts()] == [0, 1, 2]
    assert len({run.attempt(number).job for number in run.run_dir.attempts()}) == 1
    assert run.first_steps()[2] == run.last_status(1).step + 1


def test_an_engine_over_two_nodes_that_loses_one_trains_to_the_last_bit_what_two_ranks_of_one_node_do(played):
    run = played["two nodes"]
    assert_unchanged(run, played[TWO_RANKS])
    assert run.run_dir.attempts() == [1, 2]
    assert [len(run.attempt(number).nodes["inference"]) for number in (1, 2)] == [2, 2]
    assert [engine["name"][:9] for engine in run.status()["engines"]] == ["engine-0-"]


def test_a_time_limit_and_two_cancellations_change_nothing_in_one_homogeneous_allocation(played, undisturbed):
    run = played["single"]
    assert_unchanged(run, undisturbed)
    assert len(run.run_dir.attempts()) == 4
    assert run.last_status(1).why.endswith("SIGUSR2")
    assert run.first_steps()[2] == run.last_status(1).step + 1
    assert {len(nodes) for nodes in run.attempt().nodes.values()} == {1}


def test_a_run_in_containers_on_nodes_that_are_there_stops_at_ctrl_c_and_goes_on_on_others(played, undisturbed):
    run = played["foreground"]
    assert_unchanged(run, undisturbed)
    assert run.process.returncode == 0, run
    assert run.run_dir.attempts() == [1, 2, 3]
    first, second = (run.attempt(number).nodes for number in (1, 3))
    assert len({node for nodes in first.values() for node in nodes}) == 3
    assert second["head"] == second["training"] != second["inference"]
    assert run.attempt(2).nodes == {}, "its components were processes of one node"
    assert run.first_steps()[3] == run.last_status(1).step + 1
    assert read_jobs(run.run_dir) == [], "the allocation is not the run's"
    # Its components were in containers, which do not have the Python that started it.
    assert f"$ {PYTHON} -m sglang.launch_server" in run.run_dir.component_log(3, "engine", 0).read_text()
    assert run.state() == "completed"


def test_two_runs_shared_nodes(played):
    first = {name: played[name].attempt(1).nodes.values() for name in (ODD, "single")}
    one, other = ({node for of_component in nodes for node in of_component} for nodes in first.values())
    assert one & other


def test_a_run_and_an_engine_from_edited_templates_end_as_without_slurm(played, undisturbed):
    run = played["by hand"]
    assert_unchanged(run, undisturbed)
    assert run.run_dir.attempts() == [1]
    # The run's own engine may still be loading when all has been computed.
    assert run.added_works()


def test_the_files_of_a_run_tell_how_long_each_recovery_took(played):
    for name in ("sudden", "warned", "requeued"):
        rows = recoveries(played[name].run_dir)
        print(name, *rows, sep="\n")
        assert rows[0].cause == "submission"
        # Each was interrupted when it had trained, but for those that were struck while they started.
        assert {1, 2} <= {row.attempt for row in rows}
        assert all(0 < row.own_s < row.total_s for row in rows)
        assert all(row.drain_s >= 0 and row.queue_s > 0 and row.check_s > 0 and row.load_s > 0 for row in rows)

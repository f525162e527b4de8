"""Mistakes on a cluster cost one place in the queue and say what they are; ranks of two nodes start again in place; the
doctor looks at the nodes of a job; a draft is measured by a job of one node.

All runs are played side by side; each test looks at one of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from specbatch.rundir import EVALUATION_LOG
from specbatch.slurm.jobs import read_jobs
from specbatch.timestamps import seconds_of
from tests.cluster.inotify import Inotify
from tests.cluster.listening import listening
from tests.cluster.runs import STEPS, Run, play
from tests.smalltalk import write_smalltalk
from tests.tiny_target import make_tiny_target
from tools.bench.recovery import checks_s
from tools.lab import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MEMORY = "time: '30', signal_s: 60, head: {mem: 1G}"
OTHERS = "training: {mem: 4G}, inference: {mem: 4G}"
MISTAKES = {
    "interface": (f"{MEMORY}, {OTHERS}, interface: hsn0", "has no address on hsn0; it has eth0"),
    "module": (
        f"{MEMORY}, training: {{mem: 4G}}, inference: {{mem: 4G, setup: [load-no-such-module cuda, 'true']}}",
        "inference: could not be started: setup: on node",
    ),
    "container": (
        f"{MEMORY}, training: {{mem: 4G, python: python3, launch: no-such-runtime exec}}, inference: {{mem: 4G}}",
        "training: could not be started: exec: no-such-runtime: not found (exit code 127)",
    ),
    "gpus": (
        f"{MEMORY}, recovery: none, training: {{mem: 4G}}, inference: {{partition: gpu, gpus_per_node: 1, mem: 4G}}",
        "has no device file of a GPU",
    ),
}
"""Mistakes by the run's name, with the message that the user reads."""
STEADY_S = 8.0
LONG, SNAPSHOT = 180, 90
"""Steps of a run that is watched while it trains, and its first snapshot."""
PORTS = range(21000, 21500)
Listener = tuple[str, str, int]
"""The end of a process's command line, and the address and port on which it listens."""
SHORT = ("--prompts=2", "--max_new_tokens=16")


class Examined(Run):
    """Return the doctor's findings about a run whose two ranks, and the two parts of its engine, are on two nodes each,
    the latter with copies of the target."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        slurm = f"{MEMORY}, stage_target: /dev/shm, training: {{nodes: 2, mem: 4G}}, inference: {{nodes: 2, mem: 4G}}"
        super().__init__(lab, folder, "seen", f"{{{slurm}}}", "tensor_parallel: 2, nodes_per_engine: 2")
        self.config.write_text(self.config.read_text().replace("ranks: 1", "ranks: 2"))

    def submit(self) -> Callable[[], bool]:
        return self.doing("doctor", "--config", str(self.config), "--submit", "--json")

    def ended(self) -> bool:
        """Return true: the command waits for its own job."""
        return True


class TwoNodes(Run):
    """A run whose two ranks are on two nodes, and whose data a job of their own prepares."""

    killed = 0.0
    quiet: tuple[float, list[str]] = (0.0, [])
    listeners: list[Listener]

    def __init__(self, lab: Lab, folder: Path) -> None:
        slurm = f"{MEMORY}, ports: {PORTS[0]}-{PORTS[-1]}, training: {{nodes: 2, mem: 4G}}, inference: {{mem: 4G}}"
        super().__init__(lab, folder, "two", f"{{{slurm}}}")
        text = self.config.read_text().replace("ranks: 1", "ranks: 2").replace("interval: 5", f"interval: {SNAPSHOT}")
        # A quick machine is to be watched for seconds, too.
        text = text.replace(f"max_steps: {STEPS}", f"max_steps: {LONG}").replace("epochs: 8", "epochs: 24")
        self.config.write_text(text)

    def submit(self) -> Callable[[], bool]:
        return self.doing("submit", "--config", str(self.config), "--prepare", "job")

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to a rank of the newest attempt."""
        jobs = self.job_ids()
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "specbatch.training.process.rank" in (process.info["cmdline"] or []):
                    of = process.environ()
                    if of.get("SLURM_JOB_ID") in jobs and of.get("RANK") == str(rank):
                        process.kill()
                        self.killed = time.time()
        assert self.killed, f"there is no rank {rank} of jobs {jobs}"

    def job_ids(self) -> set[str]:
        """The job's id and those of its components: tasks have one or the other, by the version of Slurm."""
        return set(self.lab.run("squeue", "--noheader", "--all", f"--jobs={self.attempt().job}", "--format=%A").split())

    def listening(self) -> list[Listener]:
        """What the processes of all its components listen on."""
        found, jobs = [], self.job_ids()
        for process in psutil.process_iter(["cmdline"]):
            # Other processes of this machine may hide their environment, and end meanwhile.
            with contextlib.suppress(psutil.Error, FileNotFoundError, ProcessLookupError):
                # srun listens, too: Slurm gives it ports of SrunPortRange.
                if process.name() != "srun" and process.environ().get("SLURM_JOB_ID") in jobs:
                    words = " ".join(process.info["cmdline"] or [])
                    found += [(words, address, port) for address, port in listening(process.pid)]
        return sorted(found)


Events = Iterator[Callable[[], bool]]


def mistaken(run: Run) -> Events:
    """Do nothing: only the mistake happens."""
    yield run.ended


def rank_killed(run: TwoNodes) -> Events:
    """Metadata requests are counted while it trains; then the second node's rank is killed. At last its draft is
    measured."""
    yield run.reaches(3)
    watched = Inotify(run.run_dir.root)
    until = time.monotonic() + STEADY_S
    yield lambda: time.monotonic() > until or run.step() >= SNAPSHOT - 1
    run.quiet = watched.look(), watched.seen
    watched.close()
    run.listeners = run.listening()
    yield lambda: run.step() >= SNAPSHOT + 3
    run.kill_rank(1)
    yield run.ended
    yield run.doing("evaluate", str(run.run_dir.root), "--submit", *SHORT, "--slurm.stage_target=/dev/shm")
    yield run.ended


@pytest.fixture(scope="module")
def played(lab: Lab) -> dict[str, Run]:
    """All of them, after their end, by the run's name."""
    path = lab.state.home / "mistakes"
    path.mkdir()
    write_smalltalk(path, 500, 20, 50)
    make_tiny_target(path / "tiny")
    for place in [path, *path.rglob("*")]:
        os.chown(place, lab.state.uid, lab.state.uid)
    stories: dict[Run, Callable[..., Events]] = {TwoNodes(lab, path): rank_killed, Examined(lab, path): mistaken}
    for name, (slurm, _) in MISTAKES.items():
        stories[Run(lab, path, name, f"{{{slurm}}}")] = mistaken
    play(stories, 800.0, 3)
    return {run.run_dir.root.name: run for run in stories}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_place_in_the_queue_and_says_what_it_is(played: dict[str, Run], name: str):
    run, words = played[name], MISTAKES[name][1]
    assert not run.failure, run.failure
    assert run.run_dir.attempts() == [1]
    first, *others = read_jobs(run.run_dir, "run")
    # A successor was queued and called off: it never began. Where the site forbids it, none was.
    assert [job.after for job in others] == [first.id] * (name != "gpus")
    assert run.state() == "failed"
    said = run.specbatch("status", str(run.run_dir.root))
    assert words in said.splitlines()[1], said
    assert "go on with: specbatch resume" in said
    # The look at its nodes found it: nothing was loaded for it.
    assert not list(run.run_dir.attempt(1).glob("logs/*"))


def test_data_are_prepared_by_a_job_that_the_run_waited_for(played: dict[str, Run]):
    run = played["two"]
    (data,) = read_jobs(run.run_dir, "data")
    first, *_ = read_jobs(run.run_dir, "run")
    assert first.after == data.id
    said = run.config.with_suffix(".submit").read_text()
    assert f"job {data.id} prepares the data, and the run waits for it" in said
    assert "no doctor has passed for a job without profile" in said
    log = (run.run_dir.root / "job.log").read_text()
    assert log.index(" samples of ") < log.index(f"job {first.id}, restart 0")


def test_the_doctor_looks_at_every_node_of_every_component_and_leaves_rates_for_a_plan(played: dict[str, Run]):
    run = played["seen"]
    assert not run.failure, run.failure
    said = run.config.with_suffix(".doctor").read_text()
    found = json.loads(said[said.index("{") :])
    assert found["works"], said
    of = {name: {finding["what"]: finding for finding in findings} for name, findings in found["findings"].items()}
    assert "over 2 ranks by gloo, correct sums" in of["training"]["all-reduce"]["found"]
    assert "node" in of["training"]["network to inference"]["found"]
    assert of["inference"]["captured rows"]["verdict"] == "ok"
    assert of["inference"]["engine"]["verdict"] == "ok"
    engines = [finding["found"] for finding in found["findings"]["inference"] if finding["what"] == "engine"]
    assert re.fullmatch(r"started in \d+ s on 2 nodes \(on node\d+\)", engines[0]), engines
    assert re.fullmatch(r"engine-0: this is node 2 of 2 \(on node\d+\)", engines[1]), engines
    assert of["inference"]["copying the target"]["verdict"] == "ok"
    copies = f"/dev/shm/specbatch-{run.lab.state.uid}"
    assert f"--model-path={copies}/" in (Path(found["directory"]) / "attempts/1/logs/engine-1.log").read_text()
    assert of["inference"]["GPUs for torch"]["verdict"] == "not checked"
    assert of["training"]["snapshot"]["verdict"] == "ok"
    # All that can be checked on CPUs was.
    other = {
        name for findings in of.values() for name, one in findings.items() if one["verdict"] not in ("ok", "warning")
    }
    assert other == {"GPUs for torch"}
    planned = run.specbatch("plan", "--config", str(run.config), "--like", f"{found['directory']}/rates.json")
    assert "measured by the doctor" in planned


def test_ranks_of_two_nodes_start_again_in_place_while_the_engine_stays(played: dict[str, Run]):
    run = played["two"]
    assert not run.failure, run.failure
    assert run.status()["state"] == "completed", run
    assert run.run_dir.attempts() == [1]
    assert [row[0] for row in run.numbers()] == [str(step) for step in range(1, LONG + 1)]
    assert len({event["engine"] for event in run.events() if event["event"] == "stored"}) == 1
    trained = [seconds_of(event["time"]) for event in run.events() if event["event"] == "trained"]
    back_s = min(moment for moment in trained if moment > run.killed + 1) - run.killed
    log = (run.run_dir.root / "run.log").read_text()
    assert "starting engines took " in log
    assert f"step {LONG}/{LONG}" in log or "training: step " in log
    assert "POST /generate" not in run.run_dir.component_log(1, "engine", 0).read_text()
    (check_s,) = checks_s(run.run_dir).values()
    print(f"all nodes were checked in {check_s} s; the next step was trained {back_s:.1f} s after a rank was killed")


def test_what_listens_has_a_port_of_the_range_but_gloo_which_has_the_job_s_interface(played: dict[str, Run]):
    listeners = played["two"].listeners
    print(*((words[-60:], address, port) for words, address, port in listeners), sep="\n")
    # Master and dispatcher, SGLang and the store of its ranks, that of two ranks, Mooncake's clients.
    assert len([port for *_, port in listeners if port in PORTS]) >= 8
    outside = [one for one in listeners if one[2] not in PORTS]
    assert {address[:3] for _, address, _ in outside} <= {"10."}, outside
    of_ranks_and_sglang = ("specbatch.training.process.rank", "--skip-server-warmup")
    assert all(any(known in words for known in of_ranks_and_sglang) for words, *_ in outside), outside


def test_a_draft_is_measured_by_a_job_of_one_node(played: dict[str, Run]):
    run = played["two"]
    assert not run.failure, run.failure
    (job,) = read_jobs(run.run_dir, "evaluation")
    said = run.config.with_suffix(".evaluate").read_text()
    assert f"job {job.id}: measures two/export on 1 node, for at most 00:30:00" in said
    log = (run.run_dir.root / EVALUATION_LOG).read_text()
    assert f"specbatch: job {job.id}, restart 0, on node" in log
    assert f"the copy of the target was removed path=/dev/shm/specbatch-{run.lab.state.uid}/" in log
    found = json.loads(run.run_dir.evaluation.read_text())
    assert (found["prompts"], found["max_new_tokens"]) == (2, 16)
    assert found["acceptance_length"] >= 1
    assert f"measured  acceptance length {found['acceptance_length']:.2f}" in run.specbatch("status", "two")


def test_nothing_is_left_in_the_memory_of_nodes(played: dict[str, Run]):
    lab = played["two"].lab
    for name in lab.state.names:
        find = ["find", "/dev/shm", "-mindepth", "1", "-user", str(lab.state.uid)]
        left = subprocess.run([*lab.on_node(name), *find], capture_output=True, text=True, check=True).stdout
        assert left == "", name


def test_a_run_that_trains_makes_a_request_of_metadata_a_second_at_most(played: dict[str, Run]):
    rate, seen = played["two"].quiet
    assert seen
    print(f"{rate:.2f} requests of metadata a second")
    assert rate <= 1.0, seen

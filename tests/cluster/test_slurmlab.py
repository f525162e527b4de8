"""The cluster that the other tests here trust: what breaks in it breaks as on a real one, and nothing is left of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from specbatch.config import load_config
from specbatch.config.sections import SlurmComponent
from specbatch.rundir import JOB_LOG, RunDir
from specbatch.slurm.directives import directives
from specbatch.slurm.parts import parts_of
from specbatch.slurm.preamble import preamble
from specbatch.slurm.steps import component_function
from tests.cluster.clusters import cluster
from tools.lab import Lab, LabError
from tools.lab.processes import Started

pytestmark = [pytest.mark.light, pytest.mark.timeout(120)]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose sockets have paths that are short enough."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A cluster of its own: what other tests did to theirs is not to show here. It binds tasks to cores, and writes its
    mail into a file."""
    with tempfile.TemporaryDirectory(prefix="mail-", dir="/var/lib") as folder:
        program = Path(folder) / "mail"
        program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/sent\n')
        program.chmod(0o755)
        yield from cluster(6, TaskPlugin="task/affinity", MailProg=str(program))


def user(lab: Lab, *command: str) -> str:
    """Run a command as the ordinary user, and return its output."""
    argv = [*lab.as_user(), *command]
    return subprocess.run(
        argv, env=lab.user_environment(), cwd=lab.state.home, check=True, text=True, stdout=subprocess.PIPE
    ).stdout.strip()


def eventually(what: Callable[[], bool], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until
        time.sleep(0.1)


def states(lab: Lab, job: str) -> set[str]:
    return set(user(lab, "squeue", "-h", "-j", job, "-o", "%T").split())


def test_an_ordinary_user_runs_a_heterogeneous_job_and_accounting_knows(lab: Lab):
    script = lab.state.home / "het.sh"
    where = 'srun --het-group={0} sh -c "echo {0} \\$(id -un) \\$(hostname) gpus \\$CUDA_VISIBLE_DEVICES"\n'
    script.write_text(
        "#!/bin/bash\n#SBATCH --partition=cpu --output=het.out --mail-type=END\n#SBATCH hetjob\n"
        "#SBATCH --partition=gpu --gres=gpu:2 --mail-type=END\n" + where.format(0) + where.format(1)
    )
    job = user(lab, "sbatch", "--parsable", str(script))
    rows = ["sacct", "-X", "-n", "-P", "-j", job, "-o", "JobID,User,Account,State"]
    done = f"{job}+{{}}|labuser|lab|COMPLETED"
    eventually(lambda: set(user(lab, *rows).split("\n")) == {done.format(0), done.format(1)})
    head, engine = (lab.state.home / "het.out").read_text().splitlines()
    assert head == "0 labuser node1 gpus"
    assert engine.split()[:2] == ["1", "labuser"]
    assert engine.split()[2] in lab.state.gpu_names
    assert engine.endswith(" gpus 0,1")
    # Every component asks for mail; a job sends it once.
    program = re.search(r"MailProg += (\S+)", lab.run("scontrol", "show", "config"))
    assert program
    sent = Path(program[1]).with_name("sent")
    eventually(sent.exists)
    assert len(sent.read_text().splitlines()) == 1


WAYS = {
    "to each node": "gpus: gpus-per-node",
    "as resources": "gpus: gres",
    "whole nodes, of which nothing is said": "gpus: none",
    "to each task": "gpus: gpus-per-node, inference: {srun: [--gpus-per-task=2]}",
}
"""How sites give GPUs, with the setting that a profile has for it."""


@pytest.mark.parametrize("way", WAYS)
def test_engines_and_ranks_get_gpus_of_their_own_and_all_cores_of_their_step(lab: Lab, tmp_path: Path, way: str):
    run_dir = RunDir(lab.state.home / f"seen {way}")
    user(lab, "mkdir", str(run_dir.root))
    here = f"export PYTHONPATH={shlex.quote(str(Path(__file__).parents[2]))}"
    path = tmp_path / "a.yaml"
    path.write_text(
        "target: {path: some/target}\ndata: {train: [a.jsonl]}\ntraining: {ranks: 4}\n"
        f"run: {{dir: {json.dumps(str(run_dir.root))}}}\ninference: {{engines: 2, tensor_parallel: 2}}\n"
        f"slurm: {{time: '5', {WAYS[way]}}}\n"
    )
    config = load_config(path)
    config.slurm.head = SlurmComponent(partition="cpu", mem="1G")
    for part in (config.slurm.inference, config.slurm.training):
        part.partition, part.gpus_per_node, part.mem, part.setup = "gpu", 4, "2G", [here]
    config.slurm.inference.cpus_per_task, config.slurm.training.cpus_per_task = 3, 6
    lines = ["#!/bin/bash", *directives(config), *preamble(run_dir, JOB_LOG)]
    for part in parts_of(config)[1:]:
        lines += component_function(part, run_dir)
    lines += ["on_inference tests.cluster.seen inference 2", "on_training tests.cluster.seen training 4"]
    lines += [
        "srun --het-group=2 --ntasks=1 --cpus-per-task=1 --exact grep Cpus_allowed_list /proc/self/status",
        "echo done",
        "",
    ]
    user(lab, "touch", str(run_dir.config))
    subprocess.run(
        [*lab.as_user(), "sbatch", "--parsable"], env=lab.user_environment(), cwd=lab.state.home, check=True,
        input="\n".join(lines).encode(), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    log = run_dir.root / JOB_LOG
    eventually(lambda: log.exists() and log.read_text().endswith("done\n"), 60)
    seen = sorted(json.loads(line[5:]) for line in log.read_text().splitlines() if line.startswith("seen "))
    of = [(component, gpus, cpus) for component, gpus, cpus, _ in seen]
    assert of == [("inference", "0,1", "3"), ("inference", "2,3", "3"), ("training", "0,1,2,3", "6")], log.read_text()
    assert {tuple(_cores(cores)) for *_, cores in seen} == {tuple(sorted(os.sched_getaffinity(0)))}
    # What Slurm does by itself: a task is bound to some of them.
    (bound,) = (line.split()[1] for line in log.read_text().splitlines() if line.startswith("Cpus_allowed_list"))
    assert len(_cores(bound)) < len(os.sched_getaffinity(0))


def _cores(text: str) -> list[int]:
    """Return the numbers in a list as ``0-3,5``."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def test_an_unknown_account_is_refused(lab: Lab):
    with pytest.raises(subprocess.CalledProcessError):
        user(lab, "sbatch", "--account=nobody", "--wrap=true")


def test_preempted_jobs_are_warned_or_not_requeued_and_start_again(lab: Lab):
    def start(partition: str, node: str, on_warning: str) -> tuple[str, Path]:
        heard = lab.state.home / partition
        body = f"""echo start $SLURM_RESTART_COUNT >>{heard}
            trap 'echo warned >>{heard}; {on_warning}' USR2
            while :; do sleep 300 & wait; done"""
        options = [f"--partition={partition}", f"--nodelist={node}", "--signal=B:USR2@60", "--requeue"]
        return user(lab, "sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={body}"), heard

    warned, warned_heard = start("preempt", "node1", "scontrol requeue $SLURM_JOB_ID")
    sudden, sudden_heard = start("sudden", "node2", ":")
    eventually(lambda: warned_heard.exists() and sudden_heard.exists())
    lab.preempt("node1", "node2", seconds=1)
    eventually(lambda: warned_heard.read_text().split("\n") == ["start", "warned", "start 1", ""])
    eventually(lambda: sudden_heard.read_text().split("\n")[-2:] == ["start 1", ""])
    user(lab, "scancel", warned, sudden)


def test_a_node_without_power_is_found_dead_its_job_requeued_and_it_comes_back(lab: Lab):
    options = ["--partition=cpu", "--nodelist=node2", "--output=/dev/null"]
    job = user(lab, "sbatch", "--parsable", *options, "--wrap=exec sleep 86399")
    sleeper = ["sleep", "86399"]
    eventually(lambda: sleeper in [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])])
    lab.kill_node("node2")
    assert sleeper not in [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]
    assert lab.dead() == ["node2"]
    eventually(lambda: lab.node_state("node2").startswith("down"))
    eventually(lambda: states(lab, job) == {"PENDING"})
    user(lab, "scancel", job)
    lab.restore_node("node2")
    assert lab.dead() == []


def test_a_cut_node_goes_on_and_is_reached_again_when_its_cable_is_back(lab: Lab):
    ping = ["bash", "-c", f"exec 3<>/dev/tcp/{lab.state.address('node4')}/6818"]
    beats = lab.state.home / "beats"
    body = f"while :; do date +%s%N >>{beats}; sleep 0.1; done"
    options = ["--partition=cpu", "--nodelist=node3", "--output=/dev/null"]
    job = user(lab, "sbatch", "--parsable", *options, f"--wrap={body}")
    eventually(beats.exists)
    subprocess.run([*lab.on_node("node3"), *ping], check=True)
    lab.cut_node("node3")
    size = beats.stat().st_size
    assert subprocess.run(["timeout", "1", *lab.on_node("node3"), *ping], check=False).returncode != 0
    eventually(lambda: beats.stat().st_size > size)
    lab.restore_node("node3")
    subprocess.run([*lab.on_node("node3"), *ping], check=True)
    user(lab, "scancel", job)


def test_two_clusters_stand_side_by_side_and_nothing_is_left_of_one(lab: Lab, short_path: Path):
    other = Lab(short_path / "other")
    other.up(2, accounting=False)
    assert not other.up(2, accounting=False)
    own = namespaces(process.pid for process in other.state.processes.values()) - namespaces([os.getpid()])
    assert len(own) > 2
    assert other.state.net != lab.state.net
    job = other.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 300").strip()
    eventually(lambda: other.run("squeue", "-h", "-o", "%i %T").strip() == f"{job} RUNNING")
    assert job not in lab.run("squeue", "-h", "-o", "%i").split()
    device = other.state.device
    assert device in os.listdir("/sys/class/net")
    other.down()
    assert not other.folder.exists()
    assert [p for p in psutil.process_iter() if str(other.folder) in " ".join(_words(p))] == []
    assert not own & namespaces(psutil.pids())
    assert device not in os.listdir("/sys/class/net")


def namespaces(pids: Iterable[int]) -> set[str]:
    """Return the namespaces of these processes, as far as they can be read."""
    found = set()
    for pid, kind in itertools.product(pids, ("net", "mnt", "uts", "pid_for_children")):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
    return found


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_tied_cluster_dies_with_whoever_started_it(short_path: Path):
    code = (
        "import sys; from pathlib import Path; from tools.lab import Lab\n"
        "Lab(Path(sys.argv[1]), tied=True).up(1, accounting=False); print('up', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(short_path / "lab")]
    starter = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert starter.stdout
    assert starter.stdout.readline() == "up\n"
    lab = Lab(short_path / "lab")
    processes: list[Started] = list(lab.state.processes.values())
    starter.send_signal(signal.SIGKILL)
    starter.communicate()
    eventually(lambda: not any(process.alive() for process in processes))
    lab.down()
    assert not lab.folder.exists()


def test_what_cannot_be_done_is_said_in_a_line(lab: Lab, tmp_path: Path):
    with pytest.raises(LabError, match=r"no node node99; there are node1 node2"):
        lab.kill_node("node99")
    with pytest.raises(LabError, match=r"no cluster in .*; start one with `slurmlab up`"):
        Lab(tmp_path / "none").kill_node("node1")
    with pytest.raises(LabError, match="no blanks"):
        Lab(tmp_path / "a b").up()
    with pytest.raises(
        LabError, match=r"paths of \d+ characters, and Linux allows 107; choose a folder with a shorter"
    ):
        Lab(tmp_path / ("long" * 12)).up()
    done = subprocess.run(
        [*lab.as_user(), sys.executable, "tools/slurmlab", "up"],
        env=lab.user_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.split(":")[:2]) == (1, ["slurmlab", " must be root"])

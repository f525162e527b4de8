"""The batch script says what the configuration says, whatever names there are."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from specbatch.config import Config
from specbatch.config.sections import Data, Inference, Run, Slurm, SlurmComponent, Target
from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.slurm.engine_script import render_engines
from specbatch.slurm.executor import ComponentsExecutor, ComponentsWatcher, unpack
from specbatch.slurm.parts import component_count
from specbatch.slurm.script import render
from specbatch.slurm.steps import CANNOT_START

ODD = 'it\'s a "run" $(id) %j `x` \\ #'


def config_of(root: Path, slurm: Slurm, engines: int = 1) -> Config:
    return Config(
        run=Run(dir=str(root), name=root.name),
        target=Target(path="target"),
        data=Data(train=["talks.jsonl"]),
        inference=Inference(engines=engines),
        slurm=slurm,
    )


def blocks(script: str) -> list[dict[str, str]]:
    """The directives of each component, as sbatch reads them."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    found: list[dict[str, str]] = [{}]
    for line in lines:
        if line == "hetjob":
            found.append({})
        else:
            name, _, value = line.removeprefix("--").partition("=")
            found[-1][name] = value
    return found


def sruns(script: str) -> dict[str, list[str]]:
    """Options of each component's srun."""
    texts = re.findall(r"srun (.*?) \\\n\s+bash -c (?:'.*?') (\w+) \\\n", script, re.S)
    return {name: shlex.split(options) for options, name in texts}


FULL = Slurm(
    account="acct",
    partition="gpu",
    time="2:00:00",
    extra={"mail-type": "END"},
    head=SlurmComponent(partition="cpu", mem="4G", extra={"mail-type": None}),
    inference=SlurmComponent(nodes=2, gpus_per_node=4, cpus_per_task=8, launch="apptainer exec --nv a.sif"),
    training=SlurmComponent(gpus_per_node=8, setup=["module load cuda"], extra={"exclusive": True}),
)


def test_each_component_asks_for_its_own_and_repeats_what_is_common(tmp_path: Path):
    config = config_of(tmp_path / "run", FULL, engines=4)
    script = render(config, RunDir(tmp_path / "run"))
    head, inference, training = blocks(script)
    assert component_count(config) == 3
    for block in (head, inference, training):
        assert (block["account"], block["time"], block["signal"]) == ("acct", "2:00:00", "USR2@120")
        assert "no-requeue" in block
    assert (head["partition"], head["mem"], head["nodes"]) == ("cpu", "4G", "1")
    assert "mail-type" not in head
    assert "gpus-per-node" not in head
    assert (inference["partition"], inference["nodes"], inference["gpus-per-node"]) == ("gpu", "2", "4")
    assert (inference["ntasks-per-node"], inference["cpus-per-task"], inference["mail-type"]) == ("2", "8", "END")
    assert (training["gpus-per-node"], training["ntasks-per-node"]) == ("8", "1")
    assert "exclusive" in training
    steps = sruns(script)
    assert steps["head"][:3] == ["--het-group=0", "--nodes=1", "--ntasks=1"]
    assert steps["inference"][:4] == ["--het-group=1", "--nodes=2", "--ntasks=4", "--cpus-per-task=8"]
    assert 'exec apptainer exec --nv a.sif "$@"' in script
    assert "module load cuda\nchecked $? " in script
    assert steps["training"][-3:] == ["--cpu-bind=none", "--unbuffered", "--kill-on-bad-exit=0"]
    names = [block["job-name"] for block in (head, inference, training)]
    assert names == ["run-head", "run-engines", "run-train"]
    assert head["output"] == str(tmp_path / "run" / "job.log")


def inside(script: str, component: str) -> str:
    """Return what bash does on a component's nodes before its program."""
    quoted = re.search(rf"bash -c ((?:'[^']*'|[\"]'[\"])*) {component} \\\n", script)
    return shlex.split(quoted[1])[0]


@pytest.mark.parametrize(
    ("setup", "folder", "words"),
    [
        (["export NOTE='a b'"], "run", ""),
        (["for i in 1 2; do", "  true # a comment", "done"], "run", ""),
        (["module-that-is-not load nothere", "export X=1"], "run", "exit code 127: module-that-is-not load nothere"),
        (["true", "false", "touch started"], "run", "exit code 1: false"),
        ([], "elsewhere", "does not see the run directory"),
    ],
)
def test_a_component_that_cannot_begin_ends_with_its_reason(tmp_path: Path, setup, folder, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    slurm = dataclasses.replace(FULL, training=SlurmComponent(setup=setup))
    script = inside(render(config_of(tmp_path / "run", slurm), RunDir(tmp_path / "run")), "training")
    ran = subprocess.run(
        ["bash", "-c", script, "training", "bash", "-c", 'echo began "$NOTE" $(ulimit -c)'],
        cwd=tmp_path / folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not words:
        assert (ran.returncode, ran.stdout.split()[0], ran.stdout.split()[-1]) == (0, "began", "0")
        return
    assert (ran.returncode, ran.stdout) == (CANNOT_START, "")
    assert words in ran.stderr.splitlines()[-1]
    assert ran.stderr.splitlines()[-1].startswith("training: ")
    assert not (tmp_path / "run" / "started").exists()


def test_where_there_is_no_node_for_the_head_it_runs_on_the_first_training_node(tmp_path: Path):
    slurm = dataclasses.replace(FULL, head_on="training", gpus="gres")
    config = config_of(tmp_path / "run", slurm)
    script = render(config, RunDir(tmp_path / "run"))
    training, inference = blocks(script)
    assert component_count(config) == 2
    assert (training["gres"], inference["gres"]) == ("gpu:8", "gpu:4")
    steps = sruns(script)
    assert {"--het-group=0", "--relative=0", "--overlap"} <= set(steps["head"])
    assert {"--het-group=0", "--overlap"} <= set(steps["training"])
    assert "--het-group=1" in steps["inference"]


@pytest.mark.parametrize(("head_on", "offsets"), [("own", (0, 1, 3)), ("training", (0, 1, 0))])
def test_the_single_layout_is_one_allocation_of_all_nodes(tmp_path: Path, head_on: str, offsets: tuple[int, ...]):
    slurm = dataclasses.replace(FULL, layout="single", head_on=head_on)
    script = render(config_of(tmp_path / "run", slurm), RunDir(tmp_path / "run"))
    (block,) = blocks(script)
    assert block["nodes"] == str(4 if head_on == "own" else 3)
    steps = sruns(script)
    for name, offset in zip(("head", "inference", "training"), offsets, strict=True):
        assert f"--relative={offset}" in steps[name]


@pytest.mark.parametrize("recovery", ["chain", "requeue", "none"])
@pytest.mark.parametrize("layout", ["het", "single"])
def test_the_script_is_bash_and_survives_odd_names(tmp_path: Path, recovery: str, layout: str):
    root = tmp_path / ODD
    root.mkdir()
    config = config_of(root, dataclasses.replace(FULL, recovery=recovery, layout=layout, account='a "b" c'))
    script = ComponentsExecutor(RunDir(root), config).write()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    text = script.read_text()
    # What bash makes of the assignment is the directory.
    assignment = next(line for line in text.splitlines() if line.startswith("run="))
    shown = subprocess.run(
        ["bash", "-c", f'{assignment}\nprintf %s "$run"'], capture_output=True, text=True, check=True
    )
    assert shown.stdout == str(root)
    assert '#SBATCH --account="a \\"b\\" c"' in text
    engines = render_engines(config, RunDir(root))
    assert subprocess.run(["bash", "-n"], input=engines, text=True, check=False).returncode == 0


def test_a_line_break_in_the_name_is_refused(tmp_path: Path):
    root = tmp_path / "a\nb"
    with pytest.raises(UserError, match="line break"):
        render(config_of(root, FULL), RunDir(root))


def test_each_job_finds_its_functions_and_no_results_of_an_earlier_attempt(tmp_path: Path):
    root = tmp_path / ODD
    root.mkdir()
    config = config_of(root, FULL, engines=2)
    ComponentsExecutor(RunDir(root), config).write()
    stale = root / "submitit" / "inference" / "12_1_result.pkl"
    stale.write_bytes(b"")
    unpack(RunDir(root), config, 12)
    assert not stale.exists()
    for name in ("head", "inference", "training"):
        assert (root / "submitit" / name / "12_submitted.pkl").is_file()


def test_submitit_understands_the_rows_of_a_heterogeneous_job():
    rows = "JobID|State|NodeList\n7+0|CANCELLED by 0|node1\n7+0.batch|CANCELLED|node1\n7+1|RUNNING|node2\n"
    assert ComponentsWatcher(delay_s=1).read_info(rows)["7"]["State"] == "CANCELLED"


def test_the_script_of_a_job_whose_head_is_in_a_container_stays_outside(tmp_path):
    image = SlurmComponent(launch="ch-run image --", python="/opt/venv/bin/python")
    script = render(config_of(tmp_path, Slurm(head=image)), RunDir(tmp_path))
    outer = [line for line in script.splitlines() if "specbatch.slurm.attempt" in line]
    assert len(outer) == 4
    assert all(f"{shlex.quote(sys.executable)} -m specbatch.slurm.attempt" in line for line in outer)
    (head,) = re.findall(r"^on_head\(\) \{.*?^\}", script, re.M | re.S)
    assert 'exec ch-run image -- "$@"' in head
    assert '/opt/venv/bin/python -u -m "$@"' in head

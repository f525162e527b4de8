"""A run on the nodes of an allocation that is there: what Slurm says of it, and what fits."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from specbatch.cli import main
from specbatch.config import Config, load_config
from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.slurm import allocation
from specbatch.slurm.allocation import Allocation, check_allocation, overrides_for, read_allocation
from specbatch.slurm.parts import parts_of
from specbatch.slurm.script import render_attempt

SALLOC = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_CPUS_PER_NODE": "8(x2),4"}
RUN = """\
run: {dir: runs/a}
target: {path: some/target}
data: {train: [a.jsonl]}
training: {ranks: 4}
inference: {engines: 4}
slurm: {recovery: requeue}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "a.yaml"
    found.write_text(RUN)
    return found


def on(path: Path, there: Allocation, *overrides: str) -> Config:
    """The configuration as it is on these nodes."""
    given = [f"--{override}" for override in overrides]
    return load_config(path, [*given, *overrides_for(load_config(path, given), there)])


def test_an_allocation_is_known_by_slurm_s_variables_and_a_step_is_none():
    assert read_allocation({}) is None
    assert read_allocation(SALLOC) == Allocation(7, 3, 4, None, on_node=False)
    shell = {"SLURM_STEP_ID": "4294967290", "SLURMD_NODENAME": "node1", "SLURM_GPUS_PER_NODE": "a100:4"}
    assert read_allocation({**SALLOC, **shell}) == Allocation(7, 3, 4, 4, on_node=True)
    assert read_allocation({**SALLOC, "SLURM_STEP_ID": "0"}) is None
    with pytest.raises(UserError, match=r"job 7 is a heterogeneous allocation.*`--on here`"):
        read_allocation({**SALLOC, "SLURM_HET_SIZE": "2"})


def test_components_get_nodes_of_their_own_and_the_head_one_if_there_is_one_more(path: Path):
    def where(nodes: int) -> dict[str, str]:
        return {part.name: part.where for part in parts_of(on(path, Allocation(7, nodes, 8, None, True)))}

    assert where(3) == {"head": "--relative=0", "inference": "--relative=1", "training": "--relative=2"}
    assert where(2) == {
        "head": "--relative=0 --overlap",
        "inference": "--relative=1",
        "training": "--relative=0 --overlap",
    }
    with pytest.raises(UserError, match=r"job 7 has 1 nodes, and slurm.inference.nodes: 1 and .* take 2; ask for 2"):
        where(1)
    there = Allocation(7, 5, 8, 4, True)
    config = on(path, there)
    assert (config.slurm.inference.gpus_per_node, config.slurm.training.gpus_per_node) == (4, 4)
    assert check_allocation(config, there) == ["2 of the 5 nodes of job 7 will be idle"]
    shared = on(path, there, "slurm.head_on=training")
    assert check_allocation(shared, there) == ["3 of the 5 nodes of job 7 will be idle"]


def test_what_an_allocation_is_too_small_for_is_said_with_what_to_ask_for(path: Path):
    few = Allocation(7, 3, 3, None, True)
    with pytest.raises(UserError, match=r"has 3 CPUs of a node, .* of inference there take 4; .*--ntasks-per-node=4"):
        check_allocation(on(path, few), few)
    gpus = Allocation(7, 3, 8, 2, True)
    with pytest.raises(UserError, match=r"inference.engines: 4 .* do not fit on slurm.inference.nodes: 1"):
        check_allocation(on(path, gpus), gpus)


def test_the_script_of_an_attempt_asks_for_nothing_and_makes_no_attempt_of_its_own(path: Path, tmp_path: Path):
    text = render_attempt(on(path, Allocation(7, 3, 8, None, True)), RunDir(tmp_path / "a run"))
    assert "#SBATCH" not in text
    assert "attempt begin" not in text
    assert "scontrol" not in text
    assert re.search(r"^    srun --relative=1 --nodes=1 --ntasks=4 ", text, re.M)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_nodes_that_are_not_there_are_refused_and_a_single_one_elsewhere_is_entered(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    assert main(["run", "--config", str(path), "--on", "nodes"]) == 2
    assert "--on: nodes: this is no allocation of Slurm's; get one with `salloc`" in capsys.readouterr().err
    for name, value in {**SALLOC, "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    became = []

    class BecameError(Exception):
        pass

    def become(program: str, argv: list[str], environment: dict[str, str]) -> None:
        became.append((program, argv, environment))
        raise BecameError

    monkeypatch.setattr(allocation.os, "execvpe", become)
    with pytest.raises(BecameError):
        main(["run", "--config", str(path)])
    ((program, argv, environment),) = became
    assert (program, argv[1]) == ("srun", "--jobid=7")
    assert argv[-6:] == ["-m", "specbatch", "run", "--config", str(path), "--on=here"]
    assert "SLURM_NTASKS" not in environment

"""A job that only answers prompts: a head and engines, and nothing that trains."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from specbatch.config import Config
from specbatch.config.sections import Slurm, SlurmComponent
from specbatch.rundir import RunDir
from specbatch.slurm.check_request import check_request
from specbatch.slurm.parts import component_count, parts_of
from specbatch.slurm.script import render
from tests.slurm.test_script import blocks, config_of, sruns

ENGINES = SlurmComponent(nodes=2, gpus_per_node=4, partition="preempt")


def answers_of(root: Path, **slurm: str) -> Config:
    config = config_of(root, Slurm(inference=ENGINES, **slurm), engines=8)  # type: ignore[arg-type]
    return dataclasses.replace(config, run=dataclasses.replace(config.run, goal="answers"))


@pytest.mark.parametrize(
    ("slurm", "components", "nodes", "where"),
    [
        ({}, 2, ["1", "2"], {"head": "--het-group=0", "inference": "--het-group=1"}),
        ({"head_on": "training"}, 1, ["2"], {"head": "--relative=0", "inference": "--relative=0"}),
        ({"layout": "single"}, 1, ["3"], {"head": "--relative=0", "inference": "--relative=1"}),
        ({"layout": "single", "head_on": "training"}, 1, ["2"], {"head": "--relative=0", "inference": "--relative=0"}),
    ],
)
def test_it_asks_for_engines_alone(
    tmp_path: Path, slurm: dict[str, str], components: int, nodes: list[str], where: dict[str, str]
) -> None:
    config = answers_of(tmp_path / "run", **slurm)
    script = render(config, RunDir(tmp_path / "run"))
    assert component_count(config) == components
    assert [block["nodes"] for block in blocks(script)] == nodes
    assert blocks(script)[-1]["gpus-per-node"] == "4"
    assert blocks(script)[-1]["partition"] == "preempt"
    assert [part.name for part in parts_of(config)] == ["head", "inference"]
    assert {name: options[0] for name, options in sruns(script).items()} == where
    assert "training" not in script
    assert "trainers" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert check_request(config) == []


def test_what_would_train_is_not_checked(tmp_path: Path) -> None:
    config = answers_of(tmp_path / "run")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, ranks=7))
    assert check_request(config) == []

"""Profiles and templates give scripts that bash understands, with the directives that they promise."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from specbatch.config import Config, load_config
from specbatch.config.profile import profiles
from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.slurm.check_request import check_request
from specbatch.slurm.custom_script import make
from specbatch.slurm.directives import requests
from specbatch.slurm.engine_script import AGAIN
from specbatch.slurm.script import render

TEMPLATES = sorted((Path(__file__).resolve().parents[2] / "slurm").glob("*.sbatch"))
RUN = """\
run: {{dir: '{folder}/run'}}
target: {{path: '{target}'}}
data: {{train: [a.jsonl], max_tokens: 64}}
draft: {{vocab_size: 100}}
training: {{ranks: {gpus}, tokens_per_pack: 64, packs_per_step: {gpus}, warmup_steps: 0}}
inference: {{engines: {gpus}}}
evaluate: {{prompts: 0}}
"""


def write(folder: Path, target: Path, gpus: int = 2) -> Path:
    path = folder / "a.yaml"
    path.write_text(RUN.format(folder=folder, target=target, gpus=gpus))
    return path


def profiled(folder: Path, target: Path, name: str, *overrides: str) -> Config:
    """Return a configuration with as many ranks and engines as one node of the site has GPUs."""
    path = write(folder, target)
    gpus = load_config(path, [f"--slurm.profile={name}"]).slurm.training.gpus_per_node
    return load_config(write(folder, target, gpus), [f"--slurm.profile={name}", *overrides])


def parses(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize("name", profiles())
def test_a_profile_gives_a_script_without_what_its_site_forbids(tmp_path, tiny_target, name):
    config = profiled(tmp_path, tiny_target, name, "--slurm.account=project")
    assert check_request(config) == []
    script = render(config, RunDir(tmp_path / "run"))
    assert parses(script)
    for directive, why in config.slurm.forbidden.items():
        for value in why if isinstance(why, dict) else ("",):
            assert f"#SBATCH --{directive}{f'={value}' if value else ''}" not in script
    assert "#SBATCH --account=project" in script
    per_node = config.slurm.training.gpus_per_node
    asked = {"gpus-per-node": f"--gpus-per-node={per_node}", "gres": f"--gres=gpu:{per_node}", "none": ""}
    assert f"#SBATCH {asked[config.slurm.gpus]}" in script
    assert ("#SBATCH hetjob" in script) == (config.slurm.layout == "het")


def test_a_profile_that_wants_an_account_says_so(tmp_path, tiny_target):
    with pytest.raises(
        UserError, match=r"slurm\.account: is missing, and profile lumi says that this cluster requires it"
    ):
        check_request(profiled(tmp_path, tiny_target, "lumi"))
    with pytest.raises(
        UserError, match=r"slurm\.training: requests --mem=4G, which is forbidden here: TACC does not acc"
    ):
        check_request(profiled(tmp_path, tiny_target, "vista", "--slurm.training.mem=4G"))


def test_every_directive_can_be_taken_away_and_others_added(tmp_path, tiny_target):
    path = write(tmp_path, tiny_target)
    every = {
        name for asked in requests(load_config(path)).values() for name, value in asked.items() if value is not None
    }
    away = [f"--slurm.extra.{name}=null" for name in every]
    config = load_config(path, [*away, "--slurm.extra.mail-type=FAIL", "--slurm.head.extra.nice=5"])
    lines = [line for line in render(config, RunDir(tmp_path / "run")).splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        "#SBATCH --mail-type=FAIL", "#SBATCH --nice=5",
        "#SBATCH hetjob", "#SBATCH --mail-type=FAIL",
        "#SBATCH hetjob", "#SBATCH --mail-type=FAIL",
    ]  # fmt: skip


def test_layouts_differ_in_who_has_nodes(tmp_path, tiny_target):
    path = write(tmp_path, tiny_target)
    nodes = ["--slurm.training.nodes=2", "--slurm.inference.nodes=2"]

    def asked(*overrides: str) -> dict[str, int]:
        return {name: found["nodes"] for name, found in requests(load_config(path, [*nodes, *overrides])).items()}

    single, shared = "--slurm.layout=single", "--slurm.head_on=training"
    assert asked() == {"head": 1, "inference": 2, "training": 2}
    assert asked(shared) == {"training": 2, "inference": 2}
    assert asked(single) == {"training": 5}
    assert asked(single, shared) == {"training": 4}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_is_bash(path):
    assert parses(path.read_text())


def test_an_engine_by_hand_is_requeued_as_one_that_was_added_is():
    template = next(path for path in TEMPLATES if path.name == "engine.sbatch")
    assert template.read_text().endswith(AGAIN)


def test_a_script_by_hand_makes_the_run_from_what_its_job_was_given(tmp_path, tiny_target):
    (tmp_path / "a.jsonl").touch()
    template = next(path for path in TEMPLATES if path.name == "het.sbatch")
    job = {
        "SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "3", "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1",
        "SLURM_JOB_NUM_NODES_HET_GROUP_1": "2", "SLURM_JOB_NUM_NODES_HET_GROUP_2": "1", "SLURM_NTASKS_HET_GROUP_1": "4",
        "SLURM_GPUS_PER_NODE_HET_GROUP_1": "2", "SLURM_GPUS_PER_NODE_HET_GROUP_2": "a100:2",
    }  # fmt: skip
    commands = make(write(tmp_path, tiny_target), tmp_path / "run", template, job)
    assert parses(commands.read_text())
    assert (tmp_path / "run" / "job.sbatch").read_text() == template.read_text()
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.inference.engines, config.slurm.inference.nodes, config.slurm.training.gpus_per_node) == (4, 2, 2)
    assert make(tmp_path / "gone.yaml", tmp_path / "run", template, job) == commands


def test_a_single_allocation_by_hand_says_how_many_nodes_train(tmp_path, tiny_target):
    (tmp_path / "a.jsonl").touch()
    template = next(path for path in TEMPLATES if path.name == "single.sbatch")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SPECBATCH_TRAINING_NODES": "2"}
    make(write(tmp_path, tiny_target), tmp_path / "run", template, job)
    slurm = load_config(tmp_path / "run" / "config.yaml").slurm
    assert (slurm.layout, slurm.head_on, slurm.training.nodes, slurm.inference.nodes) == ("single", "training", 2, 1)
    for nodes, run, message in (
        ("1", tmp_path / "b", "engines need at least one"),
        ("3", Path("b"), "must be an absolute path"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "a.yaml", run, template, job | {"SLURM_JOB_NUM_NODES": nodes})
    with pytest.raises(UserError, match="this is not a Slurm job; submit the script with sbatch"):
        make(tmp_path / "a.yaml", tmp_path / "other", template, {})

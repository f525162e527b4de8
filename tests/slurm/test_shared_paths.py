"""Paths that compute nodes can't see are refused where the job is submitted."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from specbatch.config import Config, load_config
from specbatch.errors import UserError
from specbatch.slurm.shared_paths import check_shared_paths


def load(folder: Path, target: Path, *overrides: str) -> Config:
    path = folder / "a.yaml"
    (folder / "a.jsonl").touch()
    path.write_text(
        f"run: {{dir: '{folder}/run'}}\ntarget: {{path: '{target}'}}\ndata: {{train: [a.jsonl], cache_dir: cache}}\n"
    )
    return load_config(path, overrides)


def test_directories_that_every_host_has_for_itself_are_refused_unless_they_are_known_to_be_shared(
    tmp_path, tiny_target
):
    config = load(tmp_path, tiny_target, "--run.dir=/dev/shm/run", "--slurm.shared_dirs", f'["{tmp_path.anchor}proc"]')
    with pytest.raises(
        UserError, match=r"run\.dir: /dev/shm/run is below /dev, which is local to each host, .* .*\[/dev"
    ):
        check_shared_paths(config)
    config.slurm.shared_dirs = ["/"]
    assert check_shared_paths(config) == []


def test_a_disk_of_this_host_is_only_warned_of(tmp_path, tiny_target):
    # Of a directory that is not there yet, the disk of the one above it counts.
    own = Path("/srv")
    config = load(tmp_path, tiny_target)
    config.slurm.shared_dirs = [str(tmp_path), str(tiny_target), sys.prefix]
    config.run.dir = str(own / "run")
    for warning in check_shared_paths(config):
        assert warning.startswith("on this host's own disk: ")
        assert warning.endswith("name its directory in slurm.shared_dirs")


def test_a_python_that_is_not_there_is_refused_unless_a_container_brings_it(tmp_path, tiny_target):
    config = load(tmp_path, tiny_target, "--slurm.training.python=/nowhere/python", "--slurm.shared_dirs=/")
    with pytest.raises(UserError, match=r"slurm\.training\.python: there is no /nowhere/python; give the path of a"):
        check_shared_paths(config)
    config.slurm.training.launch = "apptainer exec image.sif"
    assert check_shared_paths(config) == []


def test_the_script_of_a_job_whose_head_is_in_a_container_needs_the_python_that_submits(tmp_path, tiny_target):
    config = load(tmp_path, tiny_target, "--slurm.head.python=/opt/python", "--slurm.head.launch=ch-run image --")
    config.slurm.shared_dirs = [str(tmp_path), str(tiny_target)]
    for component in (config.slurm.inference, config.slurm.training):
        component.python = "python3"
    try:
        told = " ".join(check_shared_paths(config))
    except UserError as error:  # this repository may be where each host has its own files
        told = str(error)
    assert re.search(rf"the Python that submits.*{re.escape(str(Path(sys.executable).parent))}", told)

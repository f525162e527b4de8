"""The script that each profile makes, as a file to read: a change of one shows in the review of what caused it.

``python -m tests.slurm.test_golden`` writes them anew.
"""

from __future__ import annotations

import difflib
import tempfile
from pathlib import Path

import pytest

from specbatch.config import load_config
from specbatch.config.profile import profiles
from specbatch.rundir import RunDir
from specbatch.slurm.script import render
from specbatch.slurm.submit import resolved

GOLDEN = Path(__file__).parent / "golden"
RUN = """\
run: {dir: /scratch/me/kimi, name: kimi}
target: {path: /scratch/models/target}
data: {train: [/scratch/me/talks.jsonl]}
training: {ranks: GPUS}
inference: {engines: GPUS}
slurm:
  account: acct
  head: {python: /scratch/me/venv/bin/python}
  inference: {nodes: 1, python: /scratch/me/venv/bin/python}
  training: {nodes: 1, python: /scratch/me/venv/bin/python}
"""


def script(name: str) -> str:
    """Return the script of a run with as many engines and ranks as a node has GPUs, by a profile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_text(RUN.replace("GPUS", "1"))
        profile = f"--slurm.profile={name}"
        gpus = load_config(path, [profile]).slurm.training.gpus_per_node
        path.write_text(RUN.replace("GPUS", str(gpus)))
        config = resolved(load_config(path, [profile]))
    return render(config, RunDir(Path(config.run.dir)))


@pytest.mark.parametrize("name", profiles())
def test_a_profile_s_script_is_the_one_that_was_reviewed(name: str):
    path = GOLDEN / f"{name}.sbatch"
    before = path.read_text() if path.exists() else ""
    change = "".join(difflib.unified_diff(before.splitlines(True), script(name).splitlines(True), str(path), "now"))
    assert not change, f"{change}\nif this is meant: python -m {__name__}"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in profiles():
        (GOLDEN / f"{each}.sbatch").write_text(script(each))

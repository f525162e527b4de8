"""The script of added engines."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from specbatch.cli import main
from specbatch.config import load_config
from specbatch.rundir import RunDir
from specbatch.slurm.engine_script import render_engines

RUN = '/runs/it\'s a "run" $(id) %j'
CONFIG = """
run: {dir: runs/x, name: "kimi k2: a/b"}
target: {path: target}
data: {train: [talks.jsonl]}
inference: {engines: 8, tensor_parallel: 2}
slurm:
  partition: gpu
  account: nlp
  time: "4:00:00"
  inference:
    nodes: 2
    gpus_per_node: 8
    cpus_per_task: 16
    setup: [module load cuda, "export NOTE='a b $c'"]
    launch: apptainer exec --nv "my engine.sif"
    python: /opt/my env/bin/python
    srun: [--mpi=none, "--container-mounts=/a b:/c"]
    extra: {comment-of-ours: 'say "hi"', mail-type: null}
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "c.yaml").write_text(CONFIG)
    return render_engines(load_config(tmp_path / "c.yaml"), RunDir(Path(RUN)))


def test_an_added_engine_asks_for_its_share_of_what_the_runs_engines_ask_for(script):
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--partition=gpu", "--account=nlp", "--time=4:00:00", "--nodes=1", "--ntasks-per-node=1", "--requeue"} <= {
        *directives
    }
    assert "--gpus-per-node=2" in directives
    assert '--comment-of-ours="say \\"hi\\""' in directives
    assert not any("no-requeue" in line or "mail-type" in line or "hetjob" in line for line in directives)


def test_an_added_engine_that_is_larger_than_a_node_is_a_job_of_its_nodes(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "c.yaml", ["--inference.tensor_parallel=12", "--slurm.whole_nodes=true"])
    text = render_engines(config, RunDir(Path(RUN)))
    assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --ntasks-per-node=1"} <= {*text.splitlines()}
    assert "srun --nodes=2 --ntasks=2 --cpus-per-task=16 " in text


def test_where_a_node_is_charged_whole_an_added_job_fills_it_with_engines(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "c.yaml", ["--slurm.whole_nodes=true"])
    text = render_engines(config, RunDir(Path(RUN)))
    assert {"#SBATCH --gpus-per-node=8", "#SBATCH --ntasks-per-node=4"} <= {*text.splitlines()}
    assert "srun --nodes=1 --ntasks=4 --cpus-per-task=16 " in text


def test_the_script_is_bash_and_keeps_every_word(script, tmp_path):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    words = shlex.split(re.search(r"^srun (.*?)\ncode=", script, re.M | re.S)[1].replace("\\\n", ""))
    assert words[:6] == [
        "--nodes=1", "--ntasks=1", "--cpus-per-task=16", "--cpu-bind=none", "--mpi=none", "--container-mounts=/a b:/c",
    ]  # fmt: skip
    assert words[-10:-8] == ["bash", "-c"]
    assert words[-8].splitlines()[3:] == [
        "module load cuda",
        "checked $? 'module load cuda'",
        "export NOTE='a b $c'",
        "checked $? 'export NOTE='\"'\"'a b $c'\"'\"''",
        'exec apptainer exec --nv "my engine.sif" "$@"',
    ]
    assert words[-7:] == ["engine", "/opt/my env/bin/python", "-u", "-m", "specbatch", "engine", "."]
    assigned = re.search(r"^run=.*$", script, re.M)[0]
    shown = subprocess.run(["bash", "-c", assigned + '\nprintf %s "$run"'], capture_output=True, text=True, check=True)
    assert shown.stdout == RUN


@pytest.mark.parametrize("number", ["2", "+0", "-0", "two", "+-1", "", "+1.5"])
def test_scale_takes_a_change_and_no_number(number, tmp_path, capsys):
    assert main(["scale", str(tmp_path), f"--engines={number}"]) == 2
    assert "write +2 to add two" in capsys.readouterr().err


def test_a_run_that_is_no_job_cannot_be_scaled(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run: {}\n")
    assert main(["scale", str(tmp_path), "--engines", "+1", "--partition", "preempt"]) == 2
    assert "not a Slurm job" in capsys.readouterr().err
    assert main(["scale", str(tmp_path), "--engines", "-1"]) == 2
    assert main(["scale", str(tmp_path), "--engines", "-1", "--partition", "x"]) == 2
    assert "takes no further options" in capsys.readouterr().err

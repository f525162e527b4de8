"""Data that are prepared before a run has nodes: how long that takes, and the job that does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from specbatch.config import Config, dump_config, load_config
from specbatch.corpus import prepare
from specbatch.run.run_status import read_files, run_status
from specbatch.rundir import RunDir, read_json
from specbatch.slurm.cluster import Cluster, NodeGroup, Partition
from specbatch.slurm.first_rows import check_first_rows
from specbatch.slurm.jobs import record_job
from specbatch.slurm.prepare_job import main, render_preparation
from specbatch.slurm.query import SlurmJobs
from specbatch.slurm.states import JobRow
from specbatch.slurm.submit import _Checked, _tell_of_preparing

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you?"}]}
CPU = Partition("cpu", nodes=(NodeGroup(4, 32, 64 << 30, {}, frozenset()),))
CLUSTER = Cluster({"cpu": CPU})


@pytest.fixture
def config(tmp_path: Path, tiny_target: Path) -> Config:
    (tmp_path / "a.jsonl").write_text((json.dumps(TALK) + "\n") * 1200)
    path = tmp_path / "a.yaml"
    path.write_text(
        f"run: {{dir: '{tmp_path}/run'}}\ntarget: {{path: '{tiny_target}'}}\n"
        "data: {train: [a.jsonl], cache_dir: cache}\n"
        "draft: {vocab_size: 64}\nslurm: {partition: cpu, account: lab, head: {mem: 1G, setup: ['true']}}\n"
    )
    return load_config(path)


@pytest.fixture
def run_dir(config: Config) -> RunDir:
    found = RunDir(Path(config.run.dir))
    found.make()
    found.config.write_text(dump_config(config))
    return found


def told(config: Config, left_s: tuple[float, float] | None) -> tuple[list[str], list[str]]:
    """Warnings, and what is said besides."""
    warnings: list[str] = []
    said: list[str] = []
    _tell_of_preparing(_Checked(config, CLUSTER, "", left_s), warnings.append, said.append)
    return warnings, said


def test_what_preparing_takes_is_measured_on_the_first_rows_and_nothing_once_it_is_done(
    config: Config, settled: Callable[[], None]
):
    left_s = check_first_rows(config).left_s
    assert left_s is not None
    alone, here = left_s
    # A thousand rows of a few words: more than nothing, and no minutes. So few are not worth a second process.
    assert 0.005 < alone == here < 60
    warnings, said = told(config, left_s)
    assert (warnings, said[0][:62]) == ([], "the data is not prepared: the first attempt does it, in about ")
    settled()
    prepare(config)
    assert check_first_rows(config).left_s is None
    assert told(config, None) == ([], [])


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes a file that was just written for an old one: what was read of it is remembered."""
    return lambda: monkeypatch.setattr("specbatch.corpus.cache.SETTLED_S", -1.0)


def test_hours_of_idle_nodes_are_warned_of_with_both_remedies(config: Config):
    (warning,), said = told(config, (8 * 3600.0, 3600.0))
    assert said == []
    assert "would take about 08:00:00 for it, while 3 nodes wait" in warning
    assert "`--prepare here` does it before the run is queued, in about 01:00:00 on this host" in warning
    assert "`--prepare job` in a small job that the run waits for, in about 00:30:00" in warning


def test_the_job_asks_for_no_gpu_and_as_many_cpus_as_help(config: Config, run_dir: RunDir):
    lines = render_preparation(config, run_dir, CLUSTER, 4 * 3600.0).splitlines()
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    for line in ("job-name=run-data", "requeue", "cpus-per-task=16", "time=01:00:00", "account=lab", "mem=17408M"):
        assert line in asked
    assert not [line for line in asked if line.startswith(("gpus", "signal", "no-requeue"))]
    assert any("-m specbatch.slurm.prepare_job ." in line for line in lines)
    assert "checked $? true" in lines
    # A minute of work is done by one CPU, and takes no more than a run may.
    asked = render_preparation(config, run_dir, CLUSTER, 20.0).splitlines()
    assert "#SBATCH --cpus-per-task=1" in asked
    assert "#SBATCH --time=00:30:00" in asked


def test_the_job_prepares_and_a_run_of_data_that_can_t_be_says_so_in_its_status(config: Config, run_dir: RunDir):
    assert main(run_dir.root) == 0
    assert read_json(run_dir.corpus) is not None
    record_job(run_dir, 7, kind="data")
    record_job(run_dir, 8, after=7)
    waits = SlurmJobs({8: [JobRow(8, 0, 8, "PENDING", reason="Dependency")]}, {})
    assert run_status(read_files(run_dir), waits, 0.0).why.startswith(
        "waits for job 7 to prepare the data; Dependency: "
    )
    # Slurm ends what waits for a job that was killed, and all that it says is that.
    never = SlurmJobs({}, {8: [JobRow(8, 0, 8, "CANCELLED", user=0)]})
    assert run_status(read_files(run_dir), never, 0.0).why.startswith("job 7 did not finish preparing")
    rows = (run_dir.root.parent / "a.jsonl").read_text().replace("assistant", "user")
    (run_dir.root.parent / "a.jsonl").write_text(rows)
    assert main(run_dir.root) == 1
    found = run_status(read_files(run_dir), never, 0.0)
    assert found.state == "failed"
    assert found.why.startswith("the data can't be prepared: ")
    assert "no sample out of 1,200 rows" in found.why

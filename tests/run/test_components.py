"""The records and processes that a component leaves when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.config import Config, Data, Inference, Run, Slurm, Target, dump_config
from specbatch.errors import EngineIncomplete, RunError
from specbatch.run import components
from specbatch.run.elastic_engine import EnginePlace, _part
from specbatch.run.exit_records import read_exit_record
from specbatch.rundir import RunDir


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        run=Run(dir=str(tmp_path / "run")),
        target=Target(path="t"),
        data=Data(train=["a.jsonl"]),
        inference=Inference(tensor_parallel=4, nodes_per_engine=2),
        slurm=Slurm(),
    )


def test_a_part_of_an_engine_that_lost_a_node_ends_without_a_record_and_others_with_one(config, monkeypatch):
    monkeypatch.setattr(components, "open_log", lambda path, name: None)  # which takes over this process's output
    run_dir = RunDir(Path(config.run.dir))
    run_dir.make()
    run_dir.config.write_text(dump_config(config))

    def ends(task: int, error: Exception) -> None:
        def work(_: RunDir) -> None:
            raise error

        with pytest.raises(SystemExit):
            components._run("inference", run_dir.root, 1, task, 0, work)

    ends(0, EngineIncomplete("its first node was lost"))
    ends(1, RunError("it broke"))
    assert read_exit_record(run_dir, 1, "inference", 0) is None
    record = read_exit_record(run_dir, 1, "inference", 1)
    assert record is not None
    assert record.why == "it broke"


def test_a_task_of_an_added_engines_job_knows_its_part(config, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    for name, value in {"SLURM_ARRAY_TASK_ID": 1, "SLURM_NTASKS": 2, "SLURM_PROCID": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "as it was")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "as it was")
    place = EnginePlace.here()
    part = _part(config, RunDir(Path(config.run.dir)), place)
    assert (place.task, part.nodes, part.rank, part.first_task(place.task)) == (3, 2, 1, 2)
    assert part.address

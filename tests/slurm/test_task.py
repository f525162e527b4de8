"""A task whose node can't do its work leaves a final record, whatever component it is of; the others do theirs."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from specbatch.errors import RunError
from specbatch.run import components
from specbatch.run.exit_records import read_exit_record
from specbatch.rundir import RunDir
from specbatch.slurm.task import ComponentTask, Name


@pytest.mark.parametrize("name", ["head", "inference", "training"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("slurm: {interface: hsn9}", "has no address on hsn9; it has"),
        ("slurm: {ports: 5-6}", "slurm.ports: 5-6 is not a range"),
        ("", "target.path: there is no directory"),
    ],
)
def test_what_cannot_work_on_a_node_is_a_final_record(
    tmp_path: Path, monkeypatch, name: Name, setting: str, words: str
):
    run_dir = RunDir(tmp_path)
    run_dir.config.write_text(
        f"run: {{dir: {tmp_path}}}\ntarget: {{path: {tmp_path}/none}}\ndata: {{train: [a.jsonl]}}\n{setting}\n"
    )
    for variable, value in {"SPECBATCH_ATTEMPT": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(variable, value)
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "eth0")
    with pytest.raises(RunError, match=f"{name} 0 of attempt 1: "):
        ComponentTask(name, tmp_path)()
    record = read_exit_record(run_dir, 1, name, 0)
    assert record is not None
    assert (record.again, words in record.why, socket.gethostname() in record.why) == (False, True, True)


def test_tasks_of_engines_over_two_nodes_know_their_parts_and_the_head_counts_them(
    tmp_path: Path, monkeypatch, tiny_target: Path
):
    RunDir(tmp_path).config.write_text(
        f"run: {{dir: {tmp_path}}}\ntarget: {{path: {tiny_target}}}\ndata: {{train: [a.jsonl]}}\n"
        "inference: {engines: 2, tensor_parallel: 2, nodes_per_engine: 2}\nslurm: {inference: {nodes: 4}}\n"
    )
    started: list[tuple[object, ...]] = []
    for name in ("head", "inference"):
        monkeypatch.setattr(components, name, lambda *given: started.append(given))
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "eth0")
    monkeypatch.setenv("SPECBATCH_ATTEMPT", "1")
    for task in range(4):
        monkeypatch.setenv("SLURM_PROCID", str(task))
        ComponentTask("inference", tmp_path)()
    parts = [given[-1] for given in started]
    assert [(part.nodes, part.rank, part.first_task(task)) for task, part in enumerate(parts)] == [
        (2, 0, 0),
        (2, 1, 0),
        (2, 0, 2),
        (2, 1, 2),
    ]
    monkeypatch.setenv("SLURM_PROCID", "0")
    ComponentTask("head", tmp_path)()
    assert started[-1][-1] == 2

"""Agents of several nodes: they share a file of the attempt and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

AGENT = """
import sys
from pathlib import Path
from torch.distributed.elastic.agent.server.api import WorkerSpec
from specbatch.rundir import RunDir
from specbatch.training.agent import Agent
from specbatch.training.meeting import ManyNodes
from specbatch.training.place import Place

place = Place(int(sys.argv[2]), 2, "127.0.0.1")
rank = "import os; print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'MASTER_PORT')), flush=True)"
spec = WorkerSpec(
    role="training", local_world_size=1, entrypoint=sys.executable, args=("-c", rank),
    rdzv_handler=ManyNodes(RunDir(Path(sys.argv[1])), 1, place), monitor_interval=0.1, local_addr=place.address,
)
assert not Agent(spec, progress=lambda: 0, most=0).run().is_failed()
"""


@pytest.mark.slow
def test_agents_of_two_nodes_make_one_group_and_each_ends_with_its_own_ranks(tmp_path: Path):
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    argv = [sys.executable, "-c", AGENT, str(tmp_path)]
    same = {"text": True, "stdout": subprocess.PIPE, "env": os.environ | {"TORCH_ELASTIC_WORKER_IDENTICAL": "1"}}
    with (
        subprocess.Popen([*argv, "1"], **same) as second,
        subprocess.Popen([*argv, "0"], **same) as first,
    ):
        try:
            outputs = [agent.communicate(timeout=90)[0].split() for agent in (first, second)]
        finally:
            first.kill()
            second.kill()
    assert [output[:2] for output in outputs] == [["0", "2"], ["1", "2"]]
    assert outputs[0][2] == outputs[1][2], "both have the first rank's port"
    assert (first.returncode, second.returncode) == (0, 0)

"""Agents of several nodes: they share files of the attempt and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from specbatch.errors import AttemptError
from specbatch.rundir import RunDir, write_json
from specbatch.training.process.node import TrainingNode
from specbatch.training.process.rendezvous import ManyNodes

AGENT = """
import sys
from pathlib import Path
from torch.distributed.elastic.agent.server.api import WorkerSpec
from specbatch.rundir import RunDir
from specbatch.training.process.agent import Agent
from specbatch.training.process.rendezvous import ManyNodes
from specbatch.training.process.node import TrainingNode

place = TrainingNode(int(sys.argv[2]), 2, "127.0.0.1")
rank = '''
import os, signal, sys, time
said = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
print(*said, flush=True)
if said[3] == "0":
    # The second node's rank is killed; the first node's would run forever without noticing.
    os.kill(os.getpid(), signal.SIGKILL) if said[0] == "1" else time.sleep(600)
'''
spec = WorkerSpec(
    role="training", local_world_size=1, entrypoint=sys.executable, args=("-c", rank), max_restarts=1 << 30,
    rdzv_handler=ManyNodes(RunDir(Path(sys.argv[1])), 1, 0, place), monitor_interval=0.1, local_addr=place.address,
)
assert not Agent(spec, progress=lambda: 0, most=1).run().is_failed()
"""


@pytest.mark.slow
def test_ranks_of_all_nodes_start_again_together_when_one_dies(tmp_path: Path):
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    argv = [sys.executable, "-c", AGENT, str(tmp_path)]
    same = {"text": True, "stdout": subprocess.PIPE, "env": os.environ | {"TORCH_ELASTIC_WORKER_IDENTICAL": "1"}}
    with (
        subprocess.Popen([*argv, "1"], **same) as second,
        subprocess.Popen([*argv, "0"], **same) as first,
    ):
        try:
            outputs = [agent.communicate(timeout=90)[0].splitlines() for agent in (first, second)]
        finally:
            first.kill()
            second.kill()
    assert (first.returncode, second.returncode) == (0, 0)
    said = [[line.split() for line in output] for output in outputs]
    assert [[(line[0], line[1], line[3]) for line in lines] for lines in said] == [
        [("0", "2", "0"), ("0", "2", "1")],
        [("1", "2", "0"), ("1", "2", "1")],
    ]
    assert [line[2] for line in said[0]] == [line[2] for line in said[1]], "both have the first rank's port"


def node(root: Path, number: int, nodes: int = 3) -> ManyNodes:
    return ManyNodes(RunDir(root), 1, 0, TrainingNode(number, nodes, "127.0.0.1"))


def test_a_node_that_comes_late_joins_the_newest_start(tmp_path: Path):
    first, second, third = (node(tmp_path, number) for number in range(3))
    waiting = threading.Thread(target=third.next_rendezvous)
    waiting.start()
    ports = [first.next_rendezvous().bootstrap_store_info.master_port]
    assert second.next_rendezvous().bootstrap_store_info.master_port == ports[0]
    waiting.join(10)
    assert [each.generation for each in (first, second, third)] == [0, 0, 0]
    # Ranks of the first node die twice, before the others have looked.
    first.next_rendezvous()
    ports.append(first.next_rendezvous().bootstrap_store_info.master_port)
    third._look_s = 0.0
    assert third.num_nodes_waiting() == 1
    for each in (second, third):
        assert each.next_rendezvous().bootstrap_store_info.master_port == ports[1]
        assert each.generation == 2
    assert third.num_nodes_waiting() == 0


def test_who_waits_for_a_node_that_has_given_up_ends(tmp_path: Path):
    second = node(tmp_path, 1)
    write_json(RunDir(tmp_path).ended(1, "training", 0), {"component": "training", "task": 0, "why": "out of memory"})
    began = time.monotonic()
    with pytest.raises(AttemptError, match="training node 0 has ended: out of memory"):
        second.next_rendezvous()
    assert time.monotonic() - began < 5

"""Starts the doctor's trainer ranks of one node, with the same agent of torch as a run's."""

from __future__ import annotations

import os
from collections.abc import Iterator

from specbatch.doctor.finding import Finding, read_findings
from specbatch.doctor.site import CheckTask
from specbatch.doctor.trial import ATTEMPT
from specbatch.errors import RunError
from specbatch.rundir import RunDir
from specbatch.training.process.agent import explain, run_ranks
from specbatch.training.process.node import TrainingNode
from specbatch.training.process.rendezvous import ManyNodes, OneNode


def ranks(place: CheckTask, address: str) -> Iterator[Finding]:
    """Yield the findings of this node's ranks.

    Raises:
        RunError: a rank ended without findings.
    """
    run_dir = RunDir(place.root)
    nodes = place.config.slurm.training.nodes if place.slurm else 1
    node = TrainingNode(place.task, nodes, address)
    each = place.config.training.ranks // nodes
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
    result = run_ranks(
        ["specbatch.doctor.rank", str(place.root)],
        each,
        OneNode("doctor") if nodes == 1 else ManyNodes(run_dir, ATTEMPT, 0, node),
        address=address,
    )
    for rank in range(place.task * each, (place.task + 1) * each):
        found = read_findings(place.root / "findings" / f"rank-{rank}.json")
        if found is None and not result.is_failed():
            raise RunError(f"rank {rank} has no findings; see {run_dir.component_log(ATTEMPT, 'training', rank)}")
        yield from found or []
    if result.is_failed():
        explain(result, lambda rank: run_dir.component_log(ATTEMPT, "training", rank))

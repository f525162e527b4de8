"""Chooses CPUs for components that request GPUs but no CPUs: an even share of a node.

Slurm's default is one CPU per task, even if the task is an engine of eight GPUs, or all trainer ranks of a node.
"""

from __future__ import annotations

from dataclasses import replace

from specbatch.config import Config
from specbatch.config.engine_nodes import gpus_of_engine
from specbatch.slurm.cluster import Cluster, NodeGroup

SHARED = ("inference", "training")


def with_cpus(config: Config, cluster: Cluster | None = None) -> tuple[Config, list[str]]:
    """Set ``cpus_per_task`` of both GPU components, as far as it can be known.

    Args:
        cluster: used if neither the configuration nor its profile says it; None if unknown.

    Returns:
        the configuration, and a sentence about each number that was chosen.
    """
    slurm, said = config.slurm, []
    for name in SHARED if config.run.goal == "draft" else ("inference",):
        settings = getattr(slurm, name)
        if settings.cpus_per_task or not settings.gpus_per_node or slurm.forbidden.get("cpus-per-task"):
            continue
        gpus = gpus_of_engine(config) if name == "inference" else settings.gpus_per_node
        if slurm.cpus_per_gpu:
            cpus, how = slurm.cpus_per_gpu * gpus, f"slurm.cpus_per_gpu: {slurm.cpus_per_gpu}"
        else:
            cpus, how = _share(config, name, gpus, cluster)
        if cpus:
            slurm = replace(slurm, **{name: replace(settings, cpus_per_task=cpus)})
            said.append(f"slurm.{name}.cpus_per_task: {cpus}, by {how}")
    return replace(config, slurm=slurm), said


def _share(config: Config, name: str, gpus: int, cluster: Cluster | None) -> tuple[int, str]:
    """Return a node's share of CPUs for this number of its GPUs, and its source; 0 if unknown."""
    settings = getattr(config.slurm, name)
    partition = settings.partition or config.slurm.partition
    if cluster is None:
        return 0, ""
    there = cluster.partitions.get(partition) if partition else cluster.default_partition
    kinds = [kind for kind in there.nodes if kind.cpus and _gpus(kind, settings.gpus_per_node)] if there else []
    if not kinds:
        return 0, ""
    kind = min(kinds, key=lambda kind: kind.cpus * gpus // _gpus(kind, settings.gpus_per_node))
    whole = _gpus(kind, settings.gpus_per_node)
    return max(1, kind.cpus * gpus // whole), f"an even share of a node's {kind.cpus} CPUs among its {whole} GPUs"


def _gpus(kind: NodeGroup, asked: int) -> int:
    """Return the GPUs of a node; 0 if it has too few. If Slurm knows none, a whole node is assumed to have the
    request."""
    there = kind.gpu_count or asked
    return there if there >= asked else 0

"""The components' places in a job: how many nodes and tasks each has, and the options of srun that choose them."""

from __future__ import annotations

from dataclasses import dataclass

from specbatch.config import Config
from specbatch.config.engine_nodes import nodes_per_engine
from specbatch.config.sections import SlurmComponent


@dataclass(frozen=True)
class JobPart:
    """A component's place in the job."""

    name: str
    settings: SlurmComponent
    nodes: int
    tasks: int
    where: str
    """Options of srun that choose its nodes."""


def parts_of(config: Config) -> list[JobPart]:
    """Return the components: head, inference, training; only the first two if the run only answers prompts."""
    slurm = config.slurm
    counts = {
        "head": (1, 1),
        "inference": (slurm.inference.nodes, config.inference.engines * nodes_per_engine(config)),
        "training": (slurm.training.nodes, slurm.training.nodes),
    }
    if config.run.goal == "answers":
        del counts["training"]
    host = host_of_head(config)
    if component_count(config) > 1:
        names = [name for name in counts if name not in ("head", host)]
        groups = {"head": 0} | dict(zip([*([host] if host else []), *names], range(0 if host else 1, 3), strict=False))
        where = {name: f"--het-group={groups[name]}" for name in counts}
        where["head"] += " --relative=0" if host else ""
    else:
        first = counts[host or "head"][0]
        offsets = {"head": 0, "inference": first, "training": first + counts["inference"][0]}
        if host:
            offsets[host] = 0
        where = {name: f"--relative={offsets[name]}" for name in counts}
    if host:
        where["head"] += " --overlap"
        where[host] += " --overlap"
    return [JobPart(name, getattr(slurm, name), *counts[name], where[name]) for name in counts]


def host_of_head(config: Config) -> str:
    """Return the component on whose first node the head runs; empty if it has its own node."""
    if config.slurm.head_on == "own":
        return ""
    return "training" if config.run.goal == "draft" else "inference"


def component_count(config: Config) -> int:
    """Return the number of components that Slurm sees."""
    parts = 3 if config.run.goal == "draft" else 2
    return 1 if config.slurm.layout == "single" else parts - bool(host_of_head(config))


def main_part(config: Config) -> str:
    """Return the component whose directives a single allocation uses."""
    return "training" if config.run.goal == "draft" else "inference"

"""What each component requests from Slurm, as directives of sbatch.

Most directives of a heterogeneous job are inherited from component to component, so each component repeats all of its
own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from specbatch.config import Config
from specbatch.config.sections import SlurmComponent
from specbatch.errors import UserError
from specbatch.rundir import JOB_LOG, RunDir
from specbatch.slurm.parts import JobPart, component_count, host_of_head, main_part, parts_of
from specbatch.slurm.preamble import output_path


def directives(config: Config) -> list[str]:
    """Return the lines that request the nodes of all components."""
    lines: list[str] = []
    for index, block in enumerate(requests(config).values()):
        lines += ["", "#SBATCH hetjob"] if index else []
        lines += sbatch_lines(block)
    return lines


def requests(config: Config) -> dict[str, dict[str, Any]]:
    """Return the directives of each component that Slurm sees, by the component's name; None for a removed
    directive."""
    slurm, parts = config.slurm, {part.name: part for part in parts_of(config)}
    # The batch script runs on the first component's first node, and the head wherever the script does.
    host, main = host_of_head(config), main_part(config)
    names = [host, *(name for name in parts if name not in ("head", host))] if host else list(parts)
    if component_count(config) == 1:
        settings = parts[main].settings
        asked = resources(config, settings, sum(parts[name].nodes for name in names))
        # All nodes are alike, so each needs room for the tasks of any component.
        tasks = max(map(_tasks_per_node, parts.values()))
        cpus = max(_tasks_per_node(part) * (part.settings.cpus_per_task or 0) for part in parts.values())
        asked |= {"ntasks-per-node": tasks, "cpus-per-task": -(-cpus // tasks) or None}
        return {main: common_directives(config) | asked | slurm.extra | settings.extra}
    found = {}
    for name in names:
        part = parts[name]
        asked = resources(config, part.settings, part.nodes) | {"ntasks-per-node": _tasks_per_node(part)}
        asked["job-name"] = f"{job_name(config)}-{_SHORT[name]}"
        found[name] = common_directives(config) | asked | slurm.extra | part.settings.extra
    return found


def _tasks_per_node(part: JobPart) -> int:
    return -(-part.tasks // part.nodes)


_SHORT = {"head": "head", "inference": "engines", "training": "train"}
"""Suffixes of the job's name for each component, so that squeue shows which is which."""


def job_name(config: Config) -> str:
    """Return the common part of the names of the run's jobs."""
    return re.sub(r"[^\w.-]+", "-", config.run.name) or "specbatch"


def common_directives(config: Config) -> dict[str, Any]:
    """Return the directives that all components share."""
    slurm = config.slurm
    requeue = {"requeue": True} if slurm.recovery == "requeue" else {"no-requeue": True}
    given = {"account": slurm.account or None, "qos": slurm.qos or None, "time": slurm.time}
    output = {"output": output_path(RunDir(Path(config.run.dir).absolute()), JOB_LOG), "open-mode": "append"}
    return {"job-name": job_name(config)} | given | requeue | {"signal": f"USR2@{slurm.signal_s}"} | output


def resources(config: Config, settings: SlurmComponent, nodes: int) -> dict[str, Any]:
    """Return the directives of a component's nodes."""
    slurm, gpus = config.slurm, settings.gpus_per_node
    asked: dict[str, Any] = {
        "partition": settings.partition or slurm.partition or None,
        "nodes": nodes,
        "cpus-per-task": settings.cpus_per_task,
        "mem": settings.mem or None,
        "constraint": settings.constraint or None,
    }
    if gpus and slurm.gpus == "gpus-per-node":
        asked["gpus-per-node"] = gpus
    elif gpus and slurm.gpus == "gres":
        asked["gres"] = f"gpu:{gpus}"
    return asked


def sbatch_lines(block: dict[str, Any]) -> list[str]:
    """Return the lines of a script for some directives, without the removed ones."""
    return [f"#SBATCH {directive(name, value)}" for name, value in block.items() if value is not None]


def directive(name: str, value: Any) -> str:
    """Format a directive of sbatch for a script.

    Raises:
        UserError: its value has a line break.
    """
    if value is True:
        return f"--{name}"
    text = str(value)
    if re.search(r"[\n\r\0]", text):
        raise UserError(
            f"slurm: the directive {name} has a line break in its value, which is impossible in a batch script"
        )
    if re.fullmatch(r"[^\s\"'\\#]+", text):
        return f"--{name}={text}"
    escaped = re.sub(r'(["\\])', r"\\\1", text)
    return f'--{name}="{escaped}"'

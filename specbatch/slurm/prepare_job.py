"""A small job that prepares the data of a run, which waits for it: so GPUs are not idle while data is tokenized.

It runs ``python -m specbatch.slurm.prepare_job RUN`` on a node of the head's kind.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

from specbatch.config import Config, load_config
from specbatch.errors import RunError, UserError
from specbatch.run.prepare import prepare
from specbatch.rundir import JOB_LOG, RunDir, write_whole
from specbatch.slurm import commands
from specbatch.slurm.check_request import limit_s, memory_bytes
from specbatch.slurm.cluster import Cluster, NodeGroup
from specbatch.slurm.directives import common_directives, directive, job_name
from specbatch.slurm.durations import slurm_time
from specbatch.slurm.jobs import record_job
from specbatch.slurm.parts import JobPart
from specbatch.slurm.preamble import preamble
from specbatch.slurm.steps import python_of, step_lines

SCRIPT = "prepare.sbatch"
"""Name of the job's script in the run directory."""
MOST_CPUS, BYTES_A_CPU = 16, 1 << 30
"""The request: most CPUs, and memory for each, if the head requests memory."""
LEAST_S, MARGIN = 1800.0, 4.0
"""The requested time: least seconds, and multiple of the expected time."""
TELL_S = 30.0


def submit_preparation(config: Config, run_dir: RunDir, cluster: Cluster, left_s: float) -> int:
    """Submit the job.

    Args:
        left_s: seconds that one process would take.

    Returns:
        its id.

    Raises:
        SlurmError, UserError: as for `commands.submit`.
    """
    path = run_dir.root / SCRIPT
    write_whole(path, render_preparation(config, run_dir, cluster, left_s).encode(), mode=0o755)
    job = commands.submit(path)
    record_job(run_dir, job, kind="data")
    return job


def cpus_for(config: Config, cluster: Cluster, left_s: float) -> int:
    """Return the CPUs with which it takes about a minute, limited to those of a node of the head's partition."""
    node = _node(config, cluster)
    most = min(config.data.workers or MOST_CPUS, MOST_CPUS, node.cpus if node else 1)
    return max(1, min(most, math.ceil(left_s / 60)), min(config.slurm.head.cpus_per_task or 1, most))


def render_preparation(config: Config, run_dir: RunDir, cluster: Cluster, left_s: float) -> str:
    """Return the text of ``prepare.sbatch``; arguments as for `submit_preparation`."""
    slurm, cpus = config.slurm, cpus_for(config, cluster, left_s)
    head = replace(slurm.head, cpus_per_task=cpus)
    time_s = min(limit_s(config), max(LEAST_S, MARGIN * left_s / cpus))
    asked = {
        **{name: value for name, value in common_directives(config).items() if name not in ("signal", "no-requeue")},
        # An interrupted preparation continues.
        "requeue": True,
        "job-name": f"{job_name(config)}-data",
        "time": slurm_time(60 * math.ceil(time_s / 60)),
        "partition": head.partition or slurm.partition or None,
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": None if "cpus-per-task" in slurm.forbidden else cpus,
        "mem": _memory(config, cluster, cpus),
        "constraint": head.constraint or None,
        **slurm.extra,
        **head.extra,
    }
    lines = [
        "#!/bin/bash",
        "# Prepares the data of a run of specbatch, whose own job waits for this one.",
        "",
        *(f"#SBATCH {directive(name, value)}" for name, value in asked.items() if value is not None),
        "",
        *preamble(run_dir, JOB_LOG),
        *step_lines(JobPart("data", head, 1, 1, ""), f"{python_of(head)} -m {__spec__.name} .", run_dir),
    ]
    return "\n".join([*lines, ""])


def main(root: Path) -> int:
    """Run the job's work; return its exit code. If it fails, the run's status says why."""
    from specbatch.slurm.attempt import refuse

    run_dir, told = RunDir(root.absolute()), time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            _say(f"{what}: {done:,} of {total:,}")

    try:
        prepare(run_dir, load_config(run_dir.config), progress, _say)
    except (UserError, RunError, OSError) as error:
        refuse(run_dir, 0, f"the data can't be prepared: {error}")
        _say(str(error))
        return 1
    return 0


def _node(config: Config, cluster: Cluster) -> NodeGroup | None:
    """Return the smallest kind of node that the job may get; None if only the site knows."""
    name = config.slurm.head.partition or config.slurm.partition
    partition = cluster.partitions.get(name) if name else cluster.default_partition
    return min(partition.nodes, key=lambda kind: kind.cpus) if partition and partition.nodes else None


def _memory(config: Config, cluster: Cluster, cpus: int) -> str | None:
    asked, node = memory_bytes(config, "head"), _node(config, cluster)
    if not asked:
        return config.slurm.head.mem or None
    wanted = max(asked, (cpus + 1) * BYTES_A_CPU)
    if node and node.memory_bytes:
        wanted = min(wanted, max(asked, node.memory_bytes))
    return f"{wanted >> 20}M"


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} specbatch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

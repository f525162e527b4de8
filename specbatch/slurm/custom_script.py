"""A run whose batch script was written by hand.

``python -m specbatch.slurm.custom_script CONFIG RUN SCRIPT``, in its job.

The first call creates the run directory from the configuration, in which the job's allocation replaces what ``slurm``
says about layout, nodes, tasks and GPUs. The script itself becomes the run's ``job.sbatch``, from which its successors
are submitted. Every call prints the path of the commands that lead an attempt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from specbatch.config import Config, dump_config, load_config
from specbatch.config.engine_nodes import nodes_per_engine
from specbatch.errors import UserError
from specbatch.rundir import RunDir, write_whole
from specbatch.slurm.check_request import check_request
from specbatch.slurm.script import SCRIPT, render
from specbatch.slurm.submit import resolved

TRAINING_NODES = "SPECBATCH_TRAINING_NODES"
"""Variable with the number of nodes that train in a homogeneous allocation."""


def main(words: list[str]) -> int:
    """Handle one call of the script; return its exit code."""
    config, root, script = map(Path, words)
    try:
        print(make(config, root, script, dict(os.environ)))
    except UserError as error:
        print(f"specbatch: {error}", file=sys.stderr)
        return 2
    return 0


def make(path: Path, root: Path, script: Path, environment: dict[str, str]) -> Path:
    """Create the run directory, unless it exists.

    Args:
        path: the configuration.
        script: the batch script.
        environment: environment of the job.

    Returns:
        path of the script with the commands.

    Raises:
        UserError: the configuration can't work in this job.
    """
    from specbatch.checks import check
    from specbatch.slurm.executor import ComponentsExecutor

    if not root.is_absolute():
        raise UserError(f"{root}: must be an absolute path, since the run's next job starts in another directory")
    run_dir = RunDir(root)
    commands = root / "submitit" / "attempt.sh"
    if commands.exists():
        return commands
    if not run_dir.config.exists():
        run_dir.make()  # the job's own output may already be in it
    config = _whole(resolved(load_config(path, [f"--run.dir={root}", *_given(environment)])), environment)
    for warning in [*check(config, here=False), *check_request(config)]:
        print(f"specbatch: warning: {warning}", file=sys.stderr)
    write_whole(run_dir.config, dump_config(config).encode())
    ComponentsExecutor(run_dir, config).write()
    write_whole(root / SCRIPT, script.read_bytes(), mode=0o755)
    write_whole(commands, render(config, run_dir).encode(), mode=0o755)
    return commands


def _whole(config: Config, environment: dict[str, str]) -> Config:
    """Return the configuration with as many engines as there are nodes for, if each spans several."""
    nodes = nodes_per_engine(config)
    if nodes == 1 or environment.get("SLURM_HET_SIZE", "1") == "1":
        return config
    engines = max(1, config.slurm.inference.nodes // nodes)
    return replace(config, inference=replace(config.inference, engines=engines))


def _given(environment: dict[str, str]) -> Iterator[str]:
    """Yield the job's allocation as options of the configuration."""
    if "SLURM_JOB_ID" not in environment:
        raise UserError("this is not a Slurm job; submit the script with sbatch")
    groups = int(environment.get("SLURM_HET_SIZE", "1"))
    if groups == 1:
        nodes = int(environment["SLURM_JOB_NUM_NODES"])
        training = int(environment.get(TRAINING_NODES, "1"))
        if not 0 < training < nodes:
            raise UserError(f"{TRAINING_NODES}: {training} of {nodes} nodes can't train: engines need at least one too")
        yield from ("--slurm.layout=single", "--slurm.head_on=training")
        counts = {"training": training, "inference": nodes - training}
        gpus = dict.fromkeys(counts, gpus_of_node(environment, "SLURM_GPUS_PER_NODE"))
    else:
        names = ("head", "inference", "training") if groups == 3 else ("training", "inference")
        yield from ("--slurm.layout=het", f"--slurm.head_on={'own' if groups == 3 else 'training'}")
        counts = {name: int(environment[f"SLURM_JOB_NUM_NODES_HET_GROUP_{i}"]) for i, name in enumerate(names)}
        gpus = {name: gpus_of_node(environment, f"SLURM_GPUS_PER_NODE_HET_GROUP_{i}") for i, name in enumerate(names)}
        tasks = environment.get(f"SLURM_NTASKS_HET_GROUP_{names.index('inference')}")
        if tasks is not None:
            yield f"--inference.engines={tasks}"
    for name, count in counts.items():
        yield f"--slurm.{name}.nodes={count}"
        if gpus[name] is not None:
            yield f"--slurm.{name}.gpus_per_node={gpus[name]}"
        yield f"--slurm.{name}.mem="


def gpus_of_node(environment: Mapping[str, str], name: str) -> int | None:
    """Return the GPUs of a node, if Slurm says it as ``4`` or ``a100:4``."""
    count = environment.get(name, "").split(":")[-1]
    return int(count) if count.isdigit() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

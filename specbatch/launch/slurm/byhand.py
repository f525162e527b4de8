"""A run whose batch script was written by hand.

``python -m specbatch.launch.slurm.byhand CONFIG RUN SCRIPT``, in its job.

The first time it makes the run directory from the configuration, with what the job has been given in place of what
``slurm`` says of layout, nodes, tasks and GPUs. The script itself becomes the run's ``job.sbatch``, from which its
successors are submitted. Every time it prints the path of the commands that lead an attempt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from specbatch.config import dump_config, load_config
from specbatch.errors import UserError
from specbatch.launch.slurm.script import SCRIPT, render
from specbatch.launch.slurm.shape import check_shape
from specbatch.launch.slurm.submit import resolved
from specbatch.rundir import RunDir, write_whole

TRAINING_NODES = "SPECBATCH_TRAINING_NODES"
"""In one homogeneous allocation, how many of its nodes train."""


def main(words: list[str]) -> int:
    """One call of the script; returns its exit code."""
    config, root, script = map(Path, words)
    try:
        print(make(config, root, script, dict(os.environ)))
    except UserError as error:
        print(f"specbatch: {error}", file=sys.stderr)
        return 2
    return 0


def make(path: Path, root: Path, script: Path, environment: dict[str, str]) -> Path:
    """Make the run directory, unless there is one.

    Args:
        path: the configuration.
        script: the batch script.
        environment: of the job.

    Returns:
        the script with the commands.

    Raises:
        UserError: the configuration can't work in this job.
    """
    from specbatch.checks import check
    from specbatch.launch.slurm.executor import ComponentsExecutor

    if not root.is_absolute():
        raise UserError(f"{root}: is no absolute path, which the run directory needs: its next job starts elsewhere")
    run_dir = RunDir(root)
    commands = root / "submitit" / "attempt.sh"
    if commands.exists():
        return commands
    config = resolved(load_config(path, [f"--run.dir={root}", *_given(environment)]))
    for warning in [*check(config, here=False), *check_shape(config)]:
        print(f"specbatch: warning: {warning}", file=sys.stderr)
    write_whole(run_dir.config, dump_config(config).encode())
    ComponentsExecutor(run_dir, config).write()
    write_whole(root / SCRIPT, script.read_bytes(), mode=0o755)
    write_whole(commands, render(config, run_dir).encode(), mode=0o755)
    return commands


def _given(environment: dict[str, str]) -> Iterator[str]:
    """What the job has been given, as options of the configuration."""
    if "SLURM_JOB_ID" not in environment:
        raise UserError("this is no Slurm job: submit the script with sbatch")
    groups = int(environment.get("SLURM_HET_SIZE", "1"))
    if groups == 1:
        nodes = int(environment["SLURM_JOB_NUM_NODES"])
        training = int(environment.get(TRAINING_NODES, "1"))
        if not 0 < training < nodes:
            raise UserError(f"{TRAINING_NODES}: {training} of {nodes} nodes can't train: engines need at least one too")
        yield from ("--slurm.layout=single", "--slurm.head_on=training")
        counts = {"training": training, "inference": nodes - training}
        gpus = dict.fromkeys(counts, _gpus(environment, "SLURM_GPUS_PER_NODE"))
    else:
        names = ("head", "inference", "training") if groups == 3 else ("training", "inference")
        yield from ("--slurm.layout=het", f"--slurm.head_on={'own' if groups == 3 else 'training'}")
        counts = {name: int(environment[f"SLURM_JOB_NUM_NODES_HET_GROUP_{i}"]) for i, name in enumerate(names)}
        gpus = {name: _gpus(environment, f"SLURM_GPUS_PER_NODE_HET_GROUP_{i}") for i, name in enumerate(names)}
        tasks = environment.get(f"SLURM_NTASKS_HET_GROUP_{names.index('inference')}")
        if tasks is not None:
            yield f"--inference.engines={tasks}"
    for name, count in counts.items():
        yield f"--slurm.{name}.nodes={count}"
        if gpus[name] is not None:
            yield f"--slurm.{name}.gpus_per_node={gpus[name]}"
        yield f"--slurm.{name}.mem="


def _gpus(environment: dict[str, str], name: str) -> int | None:
    """``4``, ``a100:4``: GPUs of a node, where Slurm says it."""
    count = environment.get(name, "").split(":")[-1]
    return int(count) if count.isdigit() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

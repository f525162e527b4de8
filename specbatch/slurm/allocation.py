"""A run on the nodes of an allocation that its user has, as ``salloc`` gives one, led from the foreground.

Its components are started as in a job, through srun. Slurm's job is the allocation and not the run: it has other uses
and outlives the run, so that the run directory does not list it among the run's jobs.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.rundir import RunDir, write_whole
from specbatch.slurm.check_request import check_fit
from specbatch.slurm.custom_script import gpus_of_node
from specbatch.slurm.parts import parts_of
from specbatch.slurm.preamble import LEFT_FROM_ELSEWHERE
from specbatch.slurm.script import render_attempt

_OWN_STEPS = ("4294967290", "4294967291")
"""Numbers of the steps in which Slurm runs the shell of an allocation, and the script of a job."""


@dataclass(frozen=True)
class Allocation:
    """Resources of the allocation, read from Slurm's variables."""

    job: int
    nodes: int
    cpus: int
    """CPUs of the node that gives fewest; 0 if Slurm does not say."""
    gpus: int | None
    """GPUs of a node; None if Slurm does not say."""
    on_node: bool
    """Whether this process is on one of the nodes, and not on the host where the allocation was asked for."""


def read_allocation(environment: Mapping[str, str] = os.environ) -> Allocation | None:
    """Return the allocation of this process; None outside of one, and inside a step of one.

    Raises:
        UserError: it has several components.
    """
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", _OWN_STEPS[0])
    if not job.isdigit() or step not in _OWN_STEPS:
        return None
    if environment.get("SLURM_HET_SIZE", "1") != "1":
        raise UserError(
            f"job {job} is a heterogeneous allocation, on whose nodes `specbatch run` does not start components; ask "
            "for a plain one, or stay on this machine by `--on here`"
        )
    cpus = [int(count) for count in re.findall(r"(?:^|,)(\d+)", environment.get("SLURM_JOB_CPUS_PER_NODE", ""))]
    nodes = int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    on_node = "SLURMD_NODENAME" in environment
    return Allocation(int(job), nodes, min(cpus, default=0), gpus_of_node(environment, "SLURM_GPUS_PER_NODE"), on_node)


def overrides_for(config: Config, allocation: Allocation) -> list[str]:
    """Return the command-line settings that place a run's components on the nodes of an allocation.

    Raises:
        UserError: they don't fit there.
    """
    counts = {part.name: part.nodes for part in parts_of(config) if part.name != "head"}
    needed = sum(counts.values())
    if allocation.nodes < needed:
        asked = " and ".join(f"slurm.{name}.nodes: {count}" for name, count in counts.items())
        raise UserError(
            f"job {allocation.job} has {allocation.nodes} nodes, and {asked} take {needed}; ask for {needed}, set "
            "fewer, or stay on this machine by `--on here`"
        )
    own = config.slurm.head_on == "own" and allocation.nodes > needed
    options = ["--slurm.layout=single", f"--slurm.head_on={'own' if own else 'training'}"]
    if allocation.gpus is not None:
        options += [f"--slurm.{name}.gpus_per_node={allocation.gpus}" for name in counts]
    return options


def check_allocation(config: Config, allocation: Allocation) -> list[str]:
    """Check a run under the settings of `overrides_for` and return warnings.

    Raises:
        UserError: it can't work there.
    """
    warnings, parts = check_fit(config), parts_of(config)
    for part in parts:
        tasks = -(-part.tasks // part.nodes)
        needed = tasks * (part.settings.cpus_per_task or 1)
        if allocation.cpus and needed > allocation.cpus:
            raise UserError(
                f"job {allocation.job} has {allocation.cpus} CPUs of a node, and the tasks of {part.name} there take "
                f"{needed}; ask for more, as `salloc --ntasks-per-node={tasks} --cpus-per-task="
                f"{part.settings.cpus_per_task or 1}`, or set slurm.{part.name}.cpus_per_task"
            )
    idle = allocation.nodes - sum(part.nodes for part in parts) + (config.slurm.head_on == "training")
    if idle:
        warnings.append(f"{idle} of the {allocation.nodes} nodes of job {allocation.job} will be idle")
    return warnings


class AttemptOnNodes:
    """One process of this machine that runs an attempt's components on the nodes of the allocation."""

    def __init__(self, run_dir: RunDir, attempt: int, config: Config, allocation: Allocation) -> None:
        from specbatch.slurm.executor import ComponentsExecutor, unpack

        ComponentsExecutor(run_dir, config).write()
        unpack(run_dir, config, allocation.job)
        script = run_dir.root / "submitit" / "allocation.sh"
        write_whole(script, render_attempt(config, run_dir).encode(), mode=0o755)
        # A terminal's Ctrl-C is for this process: the dispatcher tells the components to stop.
        self._process = subprocess.Popen(
            ["bash", str(script)],
            env={**os.environ, "SPECBATCH_ATTEMPT": str(attempt)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def running(self) -> list[str]:
        """The head, whose end the script waits for; empty once it has ended."""
        return ["head"] if self._process.poll() is None else []

    def drain(self) -> None:
        """Have the components' own handlers tell the dispatcher, which can't be reached from here."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGUSR2)

    def kill(self) -> None:
        """End what is left of the attempt, at once: without its srun a step ends in seconds."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def enter_node(allocation: Allocation, argv: list[str]) -> None:
    """Replace this process with a command on the only node of an allocation.

    Args:
        argv: the command.

    Raises:
        UserError: there is no srun here.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LEFT_FROM_ELSEWHERE.split()}
    # With a terminal Ctrl-C goes through it; without one srun hands it on at once instead of telling its own state.
    how = "--pty" if os.isatty(0) and os.isatty(1) else "--disable-status"
    srun = ["srun", f"--jobid={allocation.job}", "--nodes=1", "--ntasks=1", "--cpu-bind=none", "--overlap", how]
    try:
        os.execvpe("srun", [*srun, *argv], environment)
    except FileNotFoundError as error:
        raise UserError(f"job {allocation.job}: there is no `srun` in PATH; load the module of Slurm") from error

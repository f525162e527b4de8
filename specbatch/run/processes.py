"""Runs components as local processes, through submitit's local executor, and cleans them up completely."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import submitit
from submitit.local.local import LocalJob

from specbatch.config import Config
from specbatch.gpus import CUDA, listed_gpus
from specbatch.run import components
from specbatch.rundir import RunDir

PR_SET_CHILD_SUBREAPER = 36
FOREVER_MIN = 60 * 24 * 3650
"""Time limit of local jobs; submitit's default is two minutes."""


@dataclass
class Task:
    """One process of a component, and how to start it."""

    component: str
    number: int
    start: Callable[[int], LocalJob]
    """Starts the task; its argument is the number of earlier starts."""
    job: LocalJob
    starts: int = 0
    """Number of restarts."""


@dataclass
class Components:
    """The components of one attempt on this machine."""

    tasks: dict[str, Task] = field(default_factory=dict)
    """Tasks by name: ``head``, ``inference``, ``training``."""

    def running(self) -> list[str]:
        """Return the names of tasks that have not ended."""
        return [name for name, task in self.tasks.items() if not task.job.done()]

    def start(self, name: str, component: str, number: int, start: Callable[[int], LocalJob]) -> None:
        """Start a component."""
        self.tasks[name] = Task(component, number, start, start(0))

    def start_again(self, name: str) -> None:
        """Restart a component that ended, after its remaining processes are gone."""
        task = self.tasks[name]
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("SUBMITIT_LOCAL_JOB_ID") == task.job.job_id:
                    process.kill()
        task.starts += 1
        with _ctrl_c_is_ours():
            task.job = task.start(task.starts)

    def kill(self) -> None:
        """Kill all descendants of this process at once."""
        while children := psutil.Process().children(recursive=True):
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(children, timeout=1)


def start(run_dir: RunDir, attempt: int, config: Config) -> Components:
    """Start all components of an attempt.

    Orphans of killed components become children of this process, so that `Components.kill` finds them.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    engines = 0 if run_dir.recording.exists() else config.inference.engines
    of_engines, of_ranks = shared_gpus(config, engines, listed_gpus())
    folder = run_dir.attempt(attempt) / "submitit"
    started = Components()
    os.environ["SPECBATCH_OWNER"] = str(os.getpid())
    where = (run_dir.root, attempt)
    with _ctrl_c_is_ours():
        started.start("head", "head", 0, functools.partial(_submit, folder, [], components.head, *where))
        for number in range(engines):
            name = "inference" if engines == 1 else f"inference-{number}"
            begin = functools.partial(_submit, folder, of_engines[number], components.inference, *where, number)
            started.start(name, "inference", number, begin)
        if config.run.goal == "draft":
            begin = functools.partial(_submit, folder, of_ranks, components.training, *where)
            started.start("training", "training", 0, begin)
    return started


def shared_gpus(config: Config, engines: int, names: list[str] | None) -> tuple[list[list[str]], list[str]]:
    """Return the GPUs of each engine, and of all ranks, of a run on one machine. Pure.

    Args:
        names: GPUs that the user has chosen; None for all of the machine, by number. On a machine without GPUs the
            numbers do no harm.
    """
    each, ranks = config.inference.tensor_parallel, config.training.ranks
    if names is None:
        names = [str(number) for number in range(engines * each + ranks)]
    of_engines = [names[number * each : (number + 1) * each] for number in range(engines)]
    return of_engines, names[engines * each : engines * each + ranks]


def _submit(folder: Path, gpus: list[str], component: Callable[..., None], *arguments: object) -> LocalJob:
    executor = submitit.LocalExecutor(folder=folder)
    executor.update_parameters(timeout_min=FOREVER_MIN, stderr_to_stdout=True)
    return executor.submit(_on_gpus, gpus, component, *arguments)


def _on_gpus(gpus: list[str], component: Callable[..., None], *arguments: object) -> None:
    """Run a component on these GPUs, given by number or UUID, which submitit does not support."""
    os.environ[CUDA] = ",".join(gpus)
    component(*arguments)


@contextlib.contextmanager
def _ctrl_c_is_ours() -> Iterator[None]:
    """Make processes that are started here ignore the terminal's Ctrl-C: the dispatcher tells them to stop."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

"""Components as local processes, through submitit's local executor, and nothing left of them afterwards."""

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
from specbatch.launch import components
from specbatch.rundir import RunDir

PR_SET_CHILD_SUBREAPER = 36
FOREVER_MIN = 60 * 24 * 3650
"""submitit ends local jobs after two minutes unless told otherwise."""


@dataclass
class Task:
    """One process of a component, and how to start it."""

    component: str
    number: int
    start: Callable[[int], LocalJob]
    """Given how often it was started before."""
    job: LocalJob
    starts: int = 0
    """How often it was started again."""


@dataclass
class Components:
    """The components of one attempt on this machine."""

    tasks: dict[str, Task] = field(default_factory=dict)
    """By name: ``head``, ``inference``, ``training``."""

    def running(self) -> list[str]:
        """Names of those that have not ended."""
        return [name for name, task in self.tasks.items() if not task.job.done()]

    def start(self, name: str, component: str, number: int, start: Callable[[int], LocalJob]) -> None:
        """Start a component."""
        self.tasks[name] = Task(component, number, start, start(0))

    def start_again(self, name: str) -> None:
        """Start a component that ended, once nothing is left of it."""
        task = self.tasks[name]
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("SUBMITIT_LOCAL_JOB_ID") == task.job.job_id:
                    process.kill()
        task.starts += 1
        with _ctrl_c_is_ours():
            task.job = task.start(task.starts)

    def kill(self) -> None:
        """End everything that this process started, and everything that that started, at once."""
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
    engines, tensor_parallel, ranks = config.inference.engines, config.inference.tensor_parallel, config.training.ranks
    engine_gpus = list(range(engines * tensor_parallel))
    rank_gpus = list(range(len(engine_gpus), len(engine_gpus) + ranks))
    folder = run_dir.attempt(attempt) / "submitit"
    started = Components()
    os.environ["SPECBATCH_OWNER"] = str(os.getpid())
    where = (run_dir.root, attempt)
    with _ctrl_c_is_ours():
        started.start("head", "head", 0, functools.partial(_submit, folder, [], components.head, *where))
        for number in range(engines):
            gpus = engine_gpus[number * tensor_parallel : (number + 1) * tensor_parallel]
            name = "inference" if engines == 1 else f"inference-{number}"
            begin = functools.partial(_submit, folder, gpus, components.inference, *where, number)
            started.start(name, "inference", number, begin)
        begin = functools.partial(_submit, folder, rank_gpus, components.training, *where)
        started.start("training", "training", 0, begin)
    return started


def _submit(folder: Path, gpus: list[int], component: Callable[..., None], *arguments: object) -> LocalJob:
    executor = submitit.LocalExecutor(folder=folder)
    executor.update_parameters(
        timeout_min=FOREVER_MIN, gpus_per_node=len(gpus), visible_gpus=gpus, stderr_to_stdout=True
    )
    return executor.submit(component, *arguments)


@contextlib.contextmanager
def _ctrl_c_is_ours() -> Iterator[None]:
    """A terminal's Ctrl-C goes to all its processes. Those started here ignore it: they are told by the dispatcher."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

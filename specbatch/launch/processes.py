"""Components as local processes, through submitit's local executor, and nothing left of them afterwards."""

from __future__ import annotations

import contextlib
import ctypes
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
class Components:
    """The running components of one attempt on this machine."""

    jobs: dict[str, LocalJob] = field(default_factory=dict)
    """By name: ``head``, ``inference``, ``training``."""

    def running(self) -> list[str]:
        """Names of those that have not ended."""
        return [name for name, job in self.jobs.items() if not job.done()]

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
    with _ctrl_c_is_ours():
        started.jobs["head"] = _submit(folder, [], components.head, run_dir.root, attempt)
        for task in range(engines):
            gpus = engine_gpus[task * tensor_parallel : (task + 1) * tensor_parallel]
            name = "inference" if engines == 1 else f"inference-{task}"
            started.jobs[name] = _submit(folder, gpus, components.inference, run_dir.root, attempt, task)
        started.jobs["training"] = _submit(folder, rank_gpus, components.training, run_dir.root, attempt)
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

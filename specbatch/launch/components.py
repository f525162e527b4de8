"""What a launcher starts: one function for every component, the same on a laptop and under Slurm.

Each opens its log, does its work, and leaves a mark of how it ended for the head to read. The last argument of each
is how often it was started before in this attempt, by whoever found it dead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from specbatch.component_log import open_log
from specbatch.errors import AttemptError, RunError, UserError
from specbatch.launch.address import LOOPBACK
from specbatch.launch.marks import Mark, leave_mark, read_mark
from specbatch.launch.pulse import pulse
from specbatch.launch.signals import on_signal
from specbatch.rundir import RunDir
from specbatch.training.place import ALONE, Place

log = logging.getLogger(__name__)
POLL_S = 0.2


def head(root: Path, attempt: int, starts: int = 0, host: str = LOOPBACK, training_nodes: int = 1) -> None:
    """Master, dispatcher and supervision. Returns when the attempt has ended.

    Args:
        host: address under which the other components reach this one.
        training_nodes: nodes that train, each a task.
    """
    from specbatch.launch.head import supervise

    _run("head", root, attempt, 0, starts, lambda run_dir: supervise(run_dir, attempt, host, training_nodes))


def inference(root: Path, attempt: int, task: int, starts: int = 0) -> None:
    """One engine; the first one judges the draft when training is over."""

    def work(run_dir: RunDir) -> None:
        from specbatch.inference import engine

        on_signal(lambda why: engine.drain(run_dir.root, attempt, f"inference {task} got {why}"))
        engine.main(run_dir.root, attempt, task)
        if task == 0:
            _evaluate(run_dir, attempt)

    _run("inference", root, attempt, task, starts, work)


def training(root: Path, attempt: int, starts: int = 0, place: Place = ALONE) -> None:
    """The trainer ranks of this node; on the first node also the export of what they made."""

    def work(run_dir: RunDir) -> None:
        from specbatch.training import agent

        agent.main(run_dir.root, attempt, starts, place)
        if place.node == 0 and _all_trained(run_dir, attempt):
            from specbatch.export import export

            log.info("exported draft=%s", export(run_dir))

    _run("training", root, attempt, place.node, starts, work)


def _evaluate(run_dir: RunDir, attempt: int) -> None:
    from specbatch.config import load_config
    from specbatch.evaluate import evaluate

    if not _all_trained(run_dir, attempt) or not load_config(run_dir.config).evaluate.prompts:
        return
    while (mark := read_mark(run_dir, attempt, "training", 0)) is None:
        time.sleep(POLL_S)
    if not mark.failed:
        evaluate(run_dir)


def _all_trained(run_dir: RunDir, attempt: int) -> bool:
    """Whether the dispatcher, which outlives all other components, saw the last step."""
    from specbatch.dispatch.client import Client
    from specbatch.dispatch.messages import Phase
    from specbatch.dispatch.rendezvous import wait_for

    with contextlib.closing(Client(wait_for(run_dir.rendezvous(attempt), attempt, 0.0))) as client:
        return client.status().phase is Phase.TRAINED


def _run(component: str, root: Path, attempt: int, task: int, starts: int, work: Callable[[RunDir], None]) -> None:
    run_dir = RunDir(root)
    open_log(run_dir.component_log(attempt, component, task), f"{component}-{task}")
    log.info("started pid=%d attempt=%d starts=%d", os.getpid(), attempt, starts)
    try:
        with pulse(run_dir, attempt, component, task):
            work(run_dir)
    except (UserError, RunError) as error:
        log.error("failed why=%s", error)
        leave_mark(run_dir, attempt, Mark(component, task, str(error), again=isinstance(error, AttemptError)))
        raise SystemExit(1) from error
    except Exception as error:
        log.error("failed\n%s", traceback.format_exc())
        leave_mark(run_dir, attempt, Mark(component, task, f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
    log.info("ended %s", _memory())
    leave_mark(run_dir, attempt, Mark(component, task))


def _memory() -> str:
    """Most resident memory of this process, and of the largest one that it or its children started and saw end."""
    own, child = (resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return f"peak_mib={own} largest_child_peak_mib={child}"

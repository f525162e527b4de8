"""The functions that a launcher starts: one for every component, the same on a laptop and under Slurm.

Each opens its log, does its work, and writes a record of how it ended for the head. Its argument ``starts`` is the
number of earlier starts in this attempt.
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
from typing import TYPE_CHECKING

from specbatch.config import Config, load_config
from specbatch.errors import AttemptError, EngineIncomplete, RunError, UserError
from specbatch.inference.place import WHOLE, EnginePart
from specbatch.process_log import keep_short, open_log
from specbatch.run.address import LOOPBACK
from specbatch.run.exit_records import ExitRecord, read_exit_record, write_exit_record
from specbatch.run.heartbeat import heartbeat
from specbatch.run.signals import on_signal
from specbatch.rundir import RunDir
from specbatch.training.process.node import ALONE, TrainingNode

if TYPE_CHECKING:
    from specbatch.inference.nodes import FurtherNodes

logger = logging.getLogger(__name__)
POLL_S = 0.2
_OF_CHILDREN = {"head": ("master",), "inference": ("engine",)}
"""Logs of programs that components start; trainer ranks manage their own."""


def head(
    root: Path, attempt: int, starts: int = 0, host: str = LOOPBACK, training_nodes: int = 1, engine_nodes: int = 1
) -> None:
    """Run master, dispatcher and supervision; returns when the attempt has ended.

    Args:
        host: address at which the other components reach this one.
        training_nodes: number of nodes that train, each a task.
        engine_nodes: number of nodes of an engine, each a task.
    """

    def work(run_dir: RunDir) -> None:
        from specbatch.run.answering import answer_all, answers_first
        from specbatch.run.head import supervise
        from specbatch.run.prepare import prepare

        config = load_config(run_dir.config)
        if config.run.goal == "answers":
            answer_all(run_dir, attempt, host)
            return
        if answers_first(run_dir, config):
            if not answer_all(run_dir, attempt, host):
                return
            prepare(run_dir, config, lambda *_: None, lambda text: logger.info("%s", text))
        supervise(run_dir, attempt, host, training_nodes, engine_nodes)

    _run("head", root, attempt, 0, starts, work)


def inference(root: Path, attempt: int, task: int, starts: int = 0, part: EnginePart = WHOLE) -> None:
    """Run one engine, or a node's part of it. If prompts are answered first, it does that before. The first engine
    evaluates the draft after training.

    Args:
        part: this task's part of the engine.
    """

    def work(run_dir: RunDir) -> None:
        from specbatch.inference import engine, staging

        on_signal(lambda why: engine.drain(run_dir.root, attempt, f"inference {task} got {why}"))
        with staging.removed_afterwards(lambda: _all_trained(run_dir, attempt)):
            serve(run_dir)

    def serve(run_dir: RunDir) -> None:
        from specbatch.inference import engine, nodes
        from specbatch.run.answering import answers_first

        config = load_config(run_dir.config)
        if config.run.goal == "answers" or answers_first(run_dir, config):
            from specbatch.regenerate import engine as answering

            answering.main(run_dir, attempt, task)
        if config.run.goal == "answers" or not packs_are_claimed(run_dir, attempt, config):
            return
        name = f"engine-{part.first_task(task)}"
        if part.rank:
            nodes.follow(run_dir, attempt, name, part, run_dir.component_log(attempt, "engine", task))
            return
        with nodes.further_nodes(run_dir, attempt, name, part) as further:
            engine.main(run_dir.root, attempt, task, further)
            if task == 0:
                _evaluate(run_dir, attempt, further)

    _run("inference", root, attempt, task, starts, work)


def training(root: Path, attempt: int, starts: int = 0, place: TrainingNode = ALONE) -> None:
    """Run the trainer ranks of this node; the first node also exports the draft."""

    def work(run_dir: RunDir) -> None:
        from specbatch.training.process import agent

        if not packs_are_claimed(run_dir, attempt, load_config(run_dir.config)):
            return
        agent.main(run_dir.root, attempt, starts, place)
        if place.node == 0 and _all_trained(run_dir, attempt):
            from specbatch.export import export

            logger.info("exported draft=%s", export(run_dir))

    _run("training", root, attempt, place.node, starts, work)


def packs_are_claimed(run_dir: RunDir, attempt: int, config: Config) -> bool:
    """Wait until packs can be claimed: if prompts are answered first, until that is over and the data is prepared.

    Returns:
        False if the attempt ended before that.
    """
    from specbatch.dispatch.connection_file import read

    if not config.data.regenerate.answers:
        return True
    while (found := read(run_dir.rendezvous(attempt), attempt)) is None or found.work != "packs":
        if read_exit_record(run_dir, attempt, "head", 0) is not None or run_dir.superseded(attempt):
            return False
        time.sleep(POLL_S)
    return True


def _evaluate(run_dir: RunDir, attempt: int, further: FurtherNodes | None) -> None:
    from specbatch.evaluation.serving import evaluate

    if not _all_trained(run_dir, attempt) or not load_config(run_dir.config).evaluate.prompts:
        return
    while (record := read_exit_record(run_dir, attempt, "training", 0)) is None:
        time.sleep(POLL_S)
    if not record.failed:
        evaluate(run_dir, nodes=further)


def _all_trained(run_dir: RunDir, attempt: int) -> bool:
    """Return whether the dispatcher, which outlives all other components, has recorded the last step or answer."""
    from specbatch.dispatch.client import Client
    from specbatch.dispatch.connection_file import wait_for
    from specbatch.dispatch.messages import Phase

    with contextlib.closing(Client(wait_for(run_dir.rendezvous(attempt), attempt, 0.0))) as client:
        return client.status().phase is Phase.TRAINED


def _run(component: str, root: Path, attempt: int, task: int, starts: int, work: Callable[[RunDir], None]) -> None:
    run_dir = RunDir(root)
    open_log(run_dir.component_log(attempt, component, task), f"{component}-{task}")
    logger.info("started pid=%d attempt=%d starts=%d", os.getpid(), attempt, starts)
    try:
        logs = [run_dir.component_log(attempt, name, task) for name in (component, *_OF_CHILDREN.get(component, ()))]
        keep_short(load_config(run_dir.config).run.log_limit, *logs)
        with heartbeat(run_dir, attempt, component, task):
            work(run_dir)
    except EngineIncomplete as error:
        # Without a record it counts as killed, so that all tasks of the engine are restarted.
        logger.error("ended without a record why=%s", error)
        raise SystemExit(1) from error
    except (UserError, RunError) as error:
        logger.error("failed why=%s", error)
        write_exit_record(
            run_dir, attempt, ExitRecord(component, task, str(error), again=isinstance(error, AttemptError))
        )
        raise SystemExit(1) from error
    except Exception as error:
        logger.error("failed\n%s", traceback.format_exc())
        write_exit_record(run_dir, attempt, ExitRecord(component, task, f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
    logger.info("ended %s", _memory())
    write_exit_record(run_dir, attempt, ExitRecord(component, task))


def _memory() -> str:
    """Describe the peak resident memory of this process, and of its largest ended descendant."""
    own, child = (resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return f"peak_mib={own} largest_child_peak_mib={child}"

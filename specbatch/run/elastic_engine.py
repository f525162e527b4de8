"""An engine that joins a running run from outside: from another job, on nodes that may be taken away at any time.

The run neither waits for it nor fails with it. It follows the run from attempt to attempt as long as its own job lasts.
It ends when the run has ended, or when no attempt has begun for so long that its GPU should be released.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

from specbatch.config import Config, load_config
from specbatch.config.engine_nodes import gpus_of_engine, nodes_per_engine
from specbatch.dispatch.client import DispatcherGone
from specbatch.errors import RunError, UserError
from specbatch.free_ports import use_ports
from specbatch.gpus import take_gpus
from specbatch.inference.engine import Engine, joined
from specbatch.inference.nodes import follow, further_nodes
from specbatch.inference.place import WHOLE, EnginePart
from specbatch.inference.staging import removed_afterwards, use_stage
from specbatch.process_log import open_log
from specbatch.regenerate import engine as answering
from specbatch.regenerate.engine import AnswerEngine
from specbatch.run.address import name_interface, node_address
from specbatch.run.answering import answers_first
from specbatch.run.attempts import read_attempt
from specbatch.run.components import packs_are_claimed
from specbatch.run.signals import on_signal
from specbatch.rundir import RunDir
from specbatch.slurm.jobs import record_job
from specbatch.status_file import Status, read_status

logger = logging.getLogger(__name__)

MAX_IDLE_S = 900.0
"""Seconds that it waits, idle, for the next attempt, since a requeued job has to wait for nodes."""
POLL_S = 1.0


@dataclass(frozen=True)
class EnginePlace:
    """The place where an added engine runs, which determines its name."""

    job: str
    """The Slurm job, or this machine."""
    task: int
    size: int = 1
    """Number of elements of the job's array."""
    in_slurm: bool = False

    @classmethod
    def here(cls) -> EnginePlace:
        """Return the place of this process, from Slurm's environment; without Slurm, from this machine's name and the
        process id."""
        of = os.environ.get
        job = of("SLURM_ARRAY_JOB_ID") or of("SLURM_JOB_ID")
        if job is None:
            return cls(socket.gethostname(), os.getpid())
        element, tasks = int(of("SLURM_ARRAY_TASK_ID", "0")), int(of("SLURM_NTASKS", "1"))
        size = int(of("SLURM_ARRAY_TASK_COUNT", "1"))
        return cls(job, element * tasks + int(of("SLURM_PROCID", "0")), size, True)

    @property
    def component(self) -> str:
        """Name of the component, as in the names of its logs."""
        return f"added-{self.job}"


class ElasticEngine:
    """Follows a run over its attempts.

    Args:
        part: this node's part of an engine.
        max_idle_s: see `MAX_IDLE_S`.
    """

    def __init__(
        self, run_dir: RunDir, place: EnginePlace, part: EnginePart = WHOLE, *, max_idle_s: float = MAX_IDLE_S
    ) -> None:
        self._run_dir, self._place, self._part, self._max_idle_s = run_dir, place, part, max_idle_s
        self._away = threading.Event()
        self._why = ""
        self._engine: Engine | AnswerEngine | None = None

    def leave(self, why: str) -> None:
        """Leave before the run has ended; callable from any thread. Further nodes of an engine leave with the first."""
        self._why = why
        self._away.set()
        if self._engine is not None:
            self._engine.leave(why)

    def follow(self) -> tuple[bool, str]:
        """Work for the run until it has ended, or until this engine is told to leave.

        Returns:
            whether it was told to leave, and why it ended.

        Raises:
            RunError: the engine can't be kept alive.
            EngineIncomplete: one of its nodes is lost.
        """
        served = 0
        while (attempt := self._next(served)) is not None:
            served = attempt
            self._serve(attempt)
        return self.away, self._why

    @property
    def away(self) -> bool:
        """Whether it was called away."""
        return self._away.is_set()

    def _next(self, served: int) -> int | None:
        """Return the number of an attempt that this engine has not served yet; None to end."""
        waited = 0.0
        while not self._away.is_set():
            status = read_status(self._run_dir.status) or Status()
            if self._run_dir.cancelled.exists() or status.state == "completed":
                self._why = "the run has ended"
                return None
            newest = max(self._run_dir.attempts(), default=0)
            over = status.attempt == newest and status.state in ("stopped", "failed")
            if newest > served and not over and self._run_dir.rendezvous(newest).exists():
                return newest
            if waited >= self._max_idle_s:
                self._why = f"the run has begun no attempt for {self._max_idle_s:.0f} s"
                return None
            self._away.wait(POLL_S)
            waited += POLL_S
        return None

    def _serve(self, attempt: int) -> None:
        place, run_dir, part = self._place, self._run_dir, self._part
        name, log = f"{place.component}.{part.first_task(place.task)}", f"engine-{place.job}"
        open_log(run_dir.component_log(attempt, place.component, place.task), f"{place.component}-{place.task}")
        logger.info("started pid=%d host=%s attempt=%d", os.getpid(), socket.gethostname(), attempt)
        try:
            config, path = load_config(run_dir.config), run_dir.component_log(attempt, log, place.task)
            if answers_first(run_dir, config):
                with answering.joined(run_dir, attempt, name, path) as speaking:
                    self._engine = speaking
                    if not self._away.is_set():
                        speaking.run()
            if config.run.goal == "answers" or not packs_are_claimed(run_dir, attempt, config):
                return
            if part.rank:
                follow(run_dir, attempt, name, part, path)
            else:
                self._lead(attempt, name, path)
        except DispatcherGone as error:
            # The head's node may have died, and another attempt may follow.
            logger.warning("the attempt is over why=%s", error)
        finally:
            self._engine = None
            logger.info("ended attempt=%d", attempt)

    def _lead(self, attempt: int, name: str, log: Path) -> None:
        """Work as an engine, or as the first node of one."""
        with (
            further_nodes(self._run_dir, attempt, name, self._part) as nodes,
            joined(self._run_dir, attempt, name, log, nodes) as engine,
        ):
            self._engine = engine
            if not self._away.is_set() and engine.needed(self._run_dir.snapshots):
                engine.run()


def join(run_dir: RunDir) -> tuple[bool, str]:
    """Work as an engine of a run until it has ended, or a signal asks this process to stop.

    Returns:
        the same as `ElasticEngine.follow`.

    Raises:
        RunError: the run has no prepared corpus yet, or the engine can't be kept alive.
        UserError: the run needs no engines, or the GPUs that the job requested are missing.
    """
    if run_dir.recording.exists():
        raise UserError(f"{run_dir.root}: its draft is trained on recorded steps, so it needs no engines")
    config = load_config(run_dir.config)
    if not run_dir.corpus.exists() and not answers_first(run_dir, config):
        raise RunError(f"{run_dir.root}: the run has not begun, so there is nothing to compute yet")
    place = EnginePlace.here()
    use_ports(config.slurm.ports)
    part = WHOLE
    if place.in_slurm:
        asked = config.slurm.inference.gpus_per_node > 0
        take_gpus(gpus_of_engine(config) if asked else 0, int(os.environ.get("SLURM_LOCALID", "0")))
        use_stage(config.slurm.stage_target)
        record_job(run_dir, int(place.job), kind="engines", size=place.size)
        part = _part(config, run_dir, place)
    engine = ElasticEngine(run_dir, place, part)
    on_signal(engine.leave)
    print(f"{place.component}-{place.task} on {socket.gethostname()} joins {run_dir.root}", flush=True)
    with removed_afterwards(lambda: not engine.away):
        return engine.follow()


def _part(config: Config, run_dir: RunDir, place: EnginePlace) -> EnginePart:
    """Return this task's part of an engine on several nodes; from then on its ranks communicate through the interface
    of the address."""
    nodes = nodes_per_engine(config)
    if nodes == 1:
        return WHOLE
    began = read_attempt(run_dir, max(run_dir.attempts(), default=0))
    others = {node for of in began.nodes.values() for node in of} if began else ()
    address = node_address(config.slurm.interface, others)
    name_interface(address)
    return EnginePart(nodes, place.task % nodes, address)

"""An engine that joins a running run from outside: from another job, on nodes that may be taken away at any time.

It belongs to nobody: the run neither waits for it nor fails with it. It goes with the run from attempt to attempt for
as long as its own job lasts, and ends when the run has ended, or when no attempt has begun for so long that its GPU
is better given back.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass

from specbatch.component_log import open_log
from specbatch.dispatch.client import DispatcherGone
from specbatch.errors import RunError
from specbatch.inference.engine import Engine, joined
from specbatch.launch.signals import on_signal
from specbatch.launch.slurm.jobs import record_job
from specbatch.rundir import RunDir, read_json

log = logging.getLogger(__name__)

PATIENCE_S = 900.0
"""How long it waits, idle, for the next attempt: a requeued job waits for its nodes."""
POLL_S = 1.0


@dataclass(frozen=True)
class Place:
    """Where an added engine runs, which makes its name."""

    job: str
    """The Slurm job, or this machine."""
    task: int
    size: int = 1
    """Elements of the job's array."""
    in_slurm: bool = False

    @classmethod
    def here(cls) -> Place:
        """From Slurm's environment; without Slurm, from this machine's name and the process."""
        of = os.environ.get
        job = of("SLURM_ARRAY_JOB_ID") or of("SLURM_JOB_ID")
        if job is None:
            return cls(socket.gethostname(), os.getpid())
        element, tasks = int(of("SLURM_ARRAY_TASK_ID", "0")), int(of("SLURM_NTASKS", "1"))
        size = int(of("SLURM_ARRAY_TASK_COUNT", "1"))
        return cls(job, element * tasks + int(of("SLURM_PROCID", "0")), size, True)

    @property
    def component(self) -> str:
        """As in the names of logs, before the task."""
        return f"added-{self.job}"


class AddedEngine:
    """Follows a run over its attempts.

    Args:
        patience_s: see `PATIENCE_S`.
    """

    def __init__(self, run_dir: RunDir, place: Place, *, patience_s: float = PATIENCE_S) -> None:
        self._run_dir, self._place, self._patience_s = run_dir, place, patience_s
        self._away = threading.Event()
        self._why = ""
        self._engine: Engine | None = None

    def leave(self, why: str) -> None:
        """Go before the run has ended; from any thread."""
        self._why = why
        self._away.set()
        if self._engine is not None:
            self._engine.leave(why)

    def follow(self) -> tuple[bool, str]:
        """Work for the run until it has ended or this engine is called away.

        Returns:
            whether it was called away, and why it ended.

        Raises:
            RunError: the engine can't be kept alive.
        """
        served = 0
        while (attempt := self._next(served)) is not None:
            served = attempt
            self._serve(attempt)
        return self._away.is_set(), self._why

    def _next(self, served: int) -> int | None:
        """The number of an attempt that this engine has not served yet; None to end."""
        waited = 0.0
        while not self._away.is_set():
            status = read_json(self._run_dir.status)
            if self._run_dir.cancelled.exists() or (status is not None and status["state"] == "completed"):
                self._why = "the run has ended"
                return None
            newest = max(self._run_dir.attempts(), default=0)
            over = status is not None and status["attempt"] == newest and status["state"] in ("stopped", "failed")
            if newest > served and not over and self._run_dir.rendezvous(newest).exists():
                return newest
            if waited >= self._patience_s:
                self._why = f"the run has begun no attempt for {self._patience_s:.0f} s"
                return None
            self._away.wait(POLL_S)
            waited += POLL_S
        return None

    def _serve(self, attempt: int) -> None:
        place, run_dir = self._place, self._run_dir
        open_log(run_dir.component_log(attempt, place.component, place.task), f"{place.component}-{place.task}")
        log.info("started pid=%d host=%s attempt=%d", os.getpid(), socket.gethostname(), attempt)
        try:
            with joined(
                run_dir,
                attempt,
                f"{place.component}.{place.task}",
                run_dir.component_log(attempt, f"engine-{place.job}", place.task),
            ) as engine:
                self._engine = engine
                if not self._away.is_set() and engine.needed(run_dir.snapshots):
                    engine.run()
        except DispatcherGone as error:
            # So it is when the head's node dies, and another attempt may come.
            log.warning("the attempt is over why=%s", error)
        finally:
            self._engine = None
        log.info("ended attempt=%d", attempt)


def join(run_dir: RunDir) -> tuple[bool, str]:
    """Be an engine of a run until it has ended, or a signal asks this process to go.

    Returns:
        as `AddedEngine.follow`.

    Raises:
        RunError: the run has no prepared corpus yet, or the engine can't be kept alive.
    """
    if not run_dir.corpus.exists():
        raise RunError(f"{run_dir.root}: the run has not begun: there is nothing to compute yet")
    place = Place.here()
    if place.in_slurm:
        record_job(run_dir, int(place.job), kind="engines", size=place.size)
    engine = AddedEngine(run_dir, place)
    on_signal(engine.leave)
    print(f"{place.component}-{place.task} on {socket.gethostname()} joins {run_dir.root}", flush=True)
    return engine.follow()

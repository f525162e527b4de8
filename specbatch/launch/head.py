"""The head: it starts the store's master and the dispatcher, watches, and alone decides that an attempt ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from specbatch.config import Config, load_config
from specbatch.dispatch.messages import Phase, Report
from specbatch.dispatch.rendezvous import Keys, Rendezvous, publish
from specbatch.dispatch.server import Server
from specbatch.dispatch.state import Dispatcher
from specbatch.errors import AttemptError, RunError
from specbatch.launch.marks import Mark, leave_mark, read_mark
from specbatch.launch.pulse import SILENT_S
from specbatch.launch.signals import on_signal
from specbatch.launch.stall import Stall, who_waits
from specbatch.rundir import RunDir, write_json
from specbatch.transfer.master import Master

log = logging.getLogger(__name__)
TICK_S = 0.3
STOP_GRACE_S = 120.0
"""How long components may take to end after everybody was told to."""
NO_STORE_GRACE_S = 10.0
"""The same without a store: ranks between two steps save what is trained, and all others have nothing to save."""


def supervise(run_dir: RunDir, attempt: int, host: str, training_nodes: int) -> None:
    """Lead an attempt to its end and write down how it ended.

    Args:
        host: address of this node, on which master and dispatcher listen.
        training_nodes: tasks that train.

    Raises:
        AttemptError: the attempt failed, and another one may do better.
        RunError: the attempt failed for good.
    """
    config = load_config(run_dir.config)
    with _serving(run_dir, attempt, config, host) as (server, master):
        _Watch(run_dir, attempt, config, server, master, training_nodes).until_the_end()


@contextlib.contextmanager
def _serving(run_dir: RunDir, attempt: int, config: Config, host: str) -> Iterator[tuple[Server, Master]]:
    """Master and dispatcher, ready, with the rendezvous published."""
    from specbatch.corpus import make_plan, open_corpus, planned_steps
    from specbatch.target import capture_contract, read_target
    from specbatch.transfer.store import StoreClient, usable_bytes

    corpus = open_corpus(run_dir)
    plan = make_plan(config, corpus)
    contract = capture_contract(config, read_target(config.target.path))
    events = _Events(run_dir.events(attempt))
    dispatcher = Dispatcher(
        plan,
        steps=planned_steps(config, plan),
        bytes_of=lambda pack: sum(contract.bytes(corpus.sample(i).loss_mask) for i in pack.samples),
        usable=usable_bytes,
        heartbeat_s=config.inference.heartbeat_s,
        ranks_per_pack=config.training.context_parallel,
    )
    keys = Keys.new()
    master_log = run_dir.component_log(attempt, "master", 0)
    with Master(host, master_log) as master:
        rendezvous = Rendezvous(
            run=os.urandom(8).hex(),
            attempt=attempt,
            host=host,
            master_port=master.rpc_port,
            metrics_port=master.metrics_port,
            dispatcher_port=0,
            server_public=keys.server_public,
            client_public=keys.client_public,
            client_secret=keys.client_secret,
            checksum_seed=keys.checksum_seed,
        )
        store = StoreClient(rendezvous, config.store)
        server = Server(
            dispatcher,
            keys,
            host,
            run=rendezvous.run,
            attempt=attempt,
            event=events.write,
            remove_prefix=store.remove_prefix,
        )
        rendezvous = msgspec.structs.replace(rendezvous, dispatcher_port=server.port)
        with contextlib.closing(events), contextlib.closing(store), server:
            publish(run_dir.rendezvous(attempt), rendezvous)
            yield server, master


class _Watch:
    """Follows an attempt, writes its status, and decides when it is over."""

    def __init__(
        self, run_dir: RunDir, attempt: int, config: Config, server: Server, master: Master, training_nodes: int
    ) -> None:
        self.run_dir, self.attempt, self.config = run_dir, attempt, config
        self.server, self.master, self.training_nodes = server, master, training_nodes
        self.began, self._began = time.time(), time.monotonic()
        self.why = ""
        self._stall = Stall(config.run.stall_timeout_s, time.monotonic())
        self._worked = False
        """Whether packs have been computed for ranks that were there."""
        self._unwritten = ""
        """Why the status can't be written."""
        self._owner = _owner()
        on_signal(self.drain)

    def drain(self, why: str) -> None:
        """End the attempt at the next step's boundary."""
        log.info("draining why=%s", why)
        self.server.drain(why)

    def until_the_end(self) -> None:
        """Return when the attempt has ended as it should, or been stopped with a snapshot.

        Raises:
            AttemptError: the attempt failed, and another one may do better.
            RunError: the attempt failed for good.
        """
        while True:
            self._refuse_if_superseded()
            report = self.server.report()
            marks = self._marks()
            failed = self._failure(report, marks)
            if failed is not None:
                self._fail(report, failed)
            if all(mark is not None for mark in marks.values()):
                state = "completed" if report.phase is Phase.TRAINED else "stopped"
                self._write(report, state, "done", report.why)
                return
            if self._owner is not None and not self._owner.is_running():
                self.drain("the process that started this run is gone")
                self._owner = None
            state = "stopping" if report.phase is Phase.STOP else "running"
            self._write_if_possible(report, state, self._stage(report, marks))
            time.sleep(TICK_S)

    def _marks(self) -> dict[str, Mark | None]:
        tasks = [("inference", task) for task in range(self.config.inference.engines)]
        tasks += [("training", node) for node in range(self.training_nodes)]
        marks = {f"{name}-{task}": read_mark(self.run_dir, self.attempt, name, task) for name, task in tasks}
        for name, seconds in self.server.silent().items():
            if seconds > SILENT_S and marks.get(name, ...) is None:
                component, _, task = name.rpartition("-")
                mark = Mark(component, int(task), f"nothing has been heard of {name} for {seconds:.0f} s", again=True)
                leave_mark(self.run_dir, self.attempt, mark)
                marks[name] = mark
        return marks

    def _failure(self, report: Report, marks: dict[str, Mark | None]) -> RunError | None:
        """Why the attempt can't go on; None while it can."""
        if not self.master.alive():
            # First, because others fail of it.
            return AttemptError(f"the store's master died; its log is {self.master.log_path}")
        training = marks["training-0"]
        trainers = [mark for name, mark in marks.items() if name.startswith("training")]
        lost = next((mark for mark in trainers if mark and mark.failed), None)
        if lost:
            return _failure_of(lost)
        engines = [mark for name, mark in marks.items() if name.startswith("inference")]
        if report.phase is Phase.WORK and all(mark is not None for mark in engines):
            broken = next((mark for mark in engines if mark and mark.failed), None)
            return _failure_of(broken) if broken else AttemptError("inference: all engines left")
        if training and engines[0] and engines[0].failed:
            return _failure_of(engines[0])
        if report.error:
            return RunError(report.error)
        stalled = self._stall.look(report, time.monotonic())
        return AttemptError(stalled) if stalled else None

    def _fail(self, report: Report, failure: RunError) -> None:
        """Let the others save what they can, then say why."""
        why = str(failure)
        self.drain(why)
        until = time.monotonic() + (STOP_GRACE_S if self.master.alive() else NO_STORE_GRACE_S)
        while any(mark is None for mark in self._marks().values()) and time.monotonic() < until:
            time.sleep(TICK_S)
        self._write(report, "failed", "done", why)
        raise failure

    def _stage(self, report: Report, marks: dict[str, Mark | None]) -> str:
        if report.phase is Phase.TRAINED:
            return "evaluating" if marks["training-0"] else "exporting"
        self._worked |= bool(report.ranks) and any(engine.packs for engine in report.engines)
        return "training" if self._worked else "starting"

    def _write_if_possible(self, report: Report, state: str, stage: str) -> None:
        """Write the status of a run that goes on, which a full disk doesn't end."""
        try:
            self._write(report, state, stage)
        except OSError as error:
            if str(error) != self._unwritten:
                log.error("STATUS NOT WRITTEN path=%s why=%s", self.run_dir.status, error)
            self._unwritten = str(error)
        else:
            self._unwritten = ""

    def _refuse_if_superseded(self) -> None:
        """This node may have been cut off and be back: what it would write is no longer true."""
        if self.run_dir.superseded(self.attempt):
            raise RunError(f"attempt {self.attempt + 1} has taken over")

    def _write(self, report: Report, state: str, stage: str, why: str = "") -> None:
        self._refuse_if_superseded()
        write_json(
            self.run_dir.status,
            {
                "state": state,
                "stage": stage,
                "phase": report.phase.value,
                "step": report.step,
                "steps": report.steps,
                "attempt": self.attempt,
                "why": why or report.why,
                "began": _iso(self.began),
                "updated": _iso(time.time()),
                "ran_s": round(time.monotonic() - self._began, 3),
                "window": {"free": report.free, "claimed": report.claimed, "stored": report.stored},
                "store": {"stored_bytes": report.stored_bytes, "budget_bytes": report.budget_bytes},
                "engines": [msgspec.to_builtins(engine) for engine in report.engines],
                "ranks": report.ranks,
                "waiting": who_waits(report),
                "lost": report.lost,
                "failed": report.failed,
                "refused": msgspec.to_builtins(report.refused),
                "troubles": [{"what": what, "why": why} for what, why in report.troubles],
                "void": [{"pack": f"{e}.{i}", "why": why} for (e, i), why in report.void],
            },
        )


def _failure_of(mark: Mark) -> RunError:
    kind = AttemptError if mark.again else RunError
    return kind(f"{mark.component}: {mark.why}")


class _Events:
    """The attempt's ``events.jsonl``: one line an event, from any thread."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        self._lock = threading.Lock()

    def write(self, event: str, /, **facts: Any) -> None:
        """Add a line."""
        with self._lock:
            self._file.write(json.dumps({"time": _iso(time.time()), "event": event, **facts}) + "\n")

    def close(self) -> None:
        self._file.close()


def _owner() -> psutil.Process | None:
    """The foreground process of a local run; the head of a job has none.

    Raises:
        RunError: if it is gone already.
    """
    pid = os.environ.get("SPECBATCH_OWNER")
    try:
        return psutil.Process(int(pid)) if pid else None
    except psutil.NoSuchProcess as error:
        raise RunError("the process that started this run is gone") from error


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")

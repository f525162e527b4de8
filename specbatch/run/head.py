"""The head: starts the store's master and the dispatcher, watches, and alone decides when an attempt ends."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator

import msgspec

from specbatch.config import Config, load_config
from specbatch.dispatch.connection_file import ConnectionFile, Keys, publish
from specbatch.dispatch.dispatcher import Dispatcher
from specbatch.dispatch.messages import Phase, Report
from specbatch.dispatch.server import Server
from specbatch.errors import AttemptError, RunError
from specbatch.run.events import Events
from specbatch.run.exit_records import ExitRecord, exit_record_names, read_exit_record, write_exit_record
from specbatch.run.heartbeat import SILENT_S
from specbatch.run.idle import Idle
from specbatch.run.owner import owner
from specbatch.run.run_log import RunLog
from specbatch.run.signals import on_signal
from specbatch.run.stall import Stall, who_waits
from specbatch.run.status_pace import StatusPace
from specbatch.rundir import JOB_LOG, RunDir
from specbatch.status_file import (
    EngineStatus,
    PackCounts,
    Status,
    StoreUse,
    Unwritten,
    VoidPack,
    read_status,
    write_status,
)
from specbatch.timestamps import timestamp
from specbatch.transfer.master import Master

logger = logging.getLogger(__name__)
TICK_S = 0.3
STOP_GRACE_S = 120.0
"""Seconds that components may take to end after all were told to."""
LOOK_S, START_LOOK_S, LOOK_FOR_SUCCESSOR_S = 5.0, 1.0, 15.0
"""Seconds between two looks into the run directory for ended components, while all work and while they start; and for a
later attempt."""
NEVER_HEARD_S = 900.0
"""Seconds until a component's first sign of life, including its setup, after which it counts as lost."""
NO_STORE_GRACE_S = 10.0
"""`STOP_GRACE_S` if the store is lost: ranks between two steps save a snapshot, and others have nothing to save."""


def supervise(run_dir: RunDir, attempt: int, host: str, training_nodes: int, engine_nodes: int = 1) -> None:
    """Lead an attempt until it ends, and record how it ended.

    Args:
        host: address of this node, on which master and dispatcher listen.
        training_nodes: number of tasks that train.
        engine_nodes: number of tasks of each engine.

    Raises:
        AttemptError: the attempt failed, and another one may do better.
        RunError: the attempt failed for good.
    """
    config = load_config(run_dir.config)
    with serving(run_dir, attempt, config, host) as (server, master):
        _AttemptWatch(run_dir, attempt, config, server, master, training_nodes, engine_nodes).until_the_end()


@contextlib.contextmanager
def serving(run_dir: RunDir, attempt: int, config: Config, host: str) -> Iterator[tuple[Server, Master | None]]:
    """Provide a ready master and dispatcher, with the rendezvous published; no master if ranks read recorded packs."""
    from specbatch.corpus import open_corpus, planned_steps
    from specbatch.drafts.base import algorithm_of
    from specbatch.recorded_plan import RecordedPlan, plan_of_run
    from specbatch.target import read_target
    from specbatch.transfer.store import StoreClient, store_of, usable_bytes

    corpus = open_corpus(run_dir)
    plan = plan_of_run(run_dir, config, corpus)
    recorded = isinstance(plan, RecordedPlan)
    contract = algorithm_of(config, read_target(config.target.path)).contract
    events = Events(run_dir.events(attempt))
    dispatcher = Dispatcher(
        plan,
        steps=planned_steps(config, plan),
        # A pack without bytes counts as stored once it enters the window.
        bytes_of=lambda pack: 0 if recorded else sum(contract.bytes(corpus.sample(i).loss_mask) for i in pack.samples),
        usable=usable_bytes,
        heartbeat_s=config.inference.heartbeat_s,
        ranks_per_pack=config.training.context_parallel,
    )
    keys = Keys.new()
    master_log = run_dir.component_log(attempt, "master", 0)
    with contextlib.ExitStack() as stack:
        stack.callback(events.close)
        master = None if recorded else stack.enter_context(Master(host, master_log))
        rendezvous = ConnectionFile.new(
            keys,
            run=os.urandom(8).hex(),
            attempt=attempt,
            host=host,
            master_port=master.rpc_port if master else 0,
            metrics_port=master.metrics_port if master else 0,
            dispatcher_port=0,
        )
        store = None if recorded else StoreClient(rendezvous, store_of(config, "head"))
        if store is not None:
            stack.callback(store.close)
        server = Server(
            dispatcher,
            keys,
            host,
            run=rendezvous.run,
            attempt=attempt,
            event=events.write,
            remove_prefix=store.remove_prefix if store else lambda prefix: None,
        )
        rendezvous = msgspec.structs.replace(rendezvous, dispatcher_port=server.port)
        with server:
            publish(run_dir.rendezvous(attempt), rendezvous)
            yield server, master


class _AttemptWatch:
    """Follows an attempt, writes its status, and decides when it is over."""

    def __init__(
        self,
        run_dir: RunDir,
        attempt: int,
        config: Config,
        server: Server,
        master: Master | None,
        training_nodes: int,
        engine_nodes: int,
    ) -> None:
        self.run_dir, self.attempt, self.config = run_dir, attempt, config
        self.server, self.master, self.training_nodes = server, master, training_nodes
        self._engines = config.inference.engines * engine_nodes if master else 0
        self.began, self._began = time.time(), time.monotonic()
        self.why = ""
        self._answers = before.answers if (before := read_status(run_dir.status)) else None
        """Counts of the answers that were generated before."""
        self._stall = Stall(config.run.stall_timeout_s, time.monotonic())
        self._idle = Idle(config.run.idle_alarm_s)
        self._worked = False
        """Whether packs have been computed for ranks that had joined."""
        self._ended: dict[str, ExitRecord | None] = {}
        self._looked = self._looked_for_successor = -math.inf
        self._unwritten = ""
        """Why the status can't be written."""
        self._owner = owner()
        # The foreground process of a local run shows each stage, however short; its disk is its own.
        self._pace = StatusPace() if self._owner is None else StatusPace(0.0, 1.0)
        on_signal(self.drain)

    def drain(self, why: str) -> None:
        """End the attempt after the current step."""
        logger.info("draining why=%s", why)
        self.server.drain(why)

    def until_the_end(self) -> None:
        """Return when the attempt has succeeded, or was stopped with a snapshot.

        Raises:
            AttemptError: the attempt failed, and another one may do better.
            RunError: the attempt failed for good.
        """
        with RunLog(self.run_dir, self.config, told_elsewhere=self._owner is not None) as log:
            while True:
                report = self.server.report()
                records = self._records(report)
                failed = self._failure(report, records)
                if failed is not None:
                    self._fail(report, failed)
                if all(record is not None for record in records.values()):
                    state = "completed" if report.phase is Phase.TRAINED else "stopped"
                    self._write(report, state, "done", report.why)
                    return
                if self._owner is not None and not self._owner.is_running():
                    self.drain("the process that started this run is gone")
                    self._owner = None
                state = "stopping" if report.phase is Phase.STOP else "running"
                log.look(self._write_if_due(report, state, self._stage(report, records)))
                time.sleep(TICK_S)

    def _records(self, report: Report | None = None) -> dict[str, ExitRecord | None]:
        """Return how each task ended; None for those that have not.

        Args:
            report: while it says that all tasks work, none should end, and the directory is checked less often.
        """
        calm = report is not None and report.phase is Phase.WORK
        now = time.monotonic()
        if calm and now - self._looked < (LOOK_S if self._worked else START_LOOK_S):
            return self._ended
        self._looked = now
        tasks = [("inference", task) for task in range(self._engines)]
        tasks += [("training", node) for node in range(self.training_nodes)]
        there = exit_record_names(self.run_dir, self.attempt)
        for component, task in tasks:
            name = f"{component}-{task}"
            if self._ended.get(name) is None:
                found = read_exit_record(self.run_dir, self.attempt, component, task) if name in there else None
                self._ended[name] = found
        silent = self.server.silent()
        for name in [name for name, record in self._ended.items() if record is None]:
            if name in silent and silent[name] > SILENT_S:
                why = f"{name} has not reported for {silent[name]:.0f} s"
            elif name not in silent and silent and now - self._began > NEVER_HEARD_S:
                # It could not even start on its node; Slurm does not end a step whose other tasks run.
                why = f"{name} has not reported since the attempt began: {JOB_LOG} may say why"
            else:
                continue
            component, _, number = name.rpartition("-")
            record = ExitRecord(component, int(number), why, again=True)
            write_exit_record(self.run_dir, self.attempt, record)
            self._ended[name] = record
        return self._ended

    def _failure(self, report: Report, records: dict[str, ExitRecord | None]) -> RunError | None:
        """Return why the attempt can't continue; None while it can."""
        if self.master is not None and not self.master.alive():
            # Checked first, because it makes other components fail.
            return AttemptError(f"the store's master died; its log is {self.master.log_path}")
        training = records["training-0"]
        trainers = [record for name, record in records.items() if name.startswith("training")]
        lost = next((record for record in trainers if record and record.failed), None)
        if lost:
            return _failure_of(lost)
        engines = [record for name, record in records.items() if name.startswith("inference")]
        if report.phase is Phase.WORK and engines and all(record is not None for record in engines):
            broken = next((record for record in engines if record and record.failed), None)
            return _failure_of(broken) if broken else AttemptError("inference: all engines have ended")
        if training and engines and engines[0] and engines[0].failed:
            return _failure_of(engines[0])
        if report.error:
            return RunError(report.error)
        stalled = self._stall.look(report, time.monotonic())
        return AttemptError(stalled) if stalled else None

    def _fail(self, report: Report, failure: RunError) -> None:
        """Let the other components save what they can, then record the reason."""
        why = str(failure)
        self.drain(why)
        # If no rank has begun to train, there is nothing to save either.
        saves = self._worked and (self.master is None or self.master.alive())
        until = time.monotonic() + (STOP_GRACE_S if saves else NO_STORE_GRACE_S)
        while any(record is None for record in self._records().values()) and time.monotonic() < until:
            time.sleep(TICK_S)
        self._write(report, "failed", "done", why)
        raise failure

    def _stage(self, report: Report, records: dict[str, ExitRecord | None]) -> str:
        if report.phase is Phase.TRAINED:
            return "evaluating" if records["training-0"] else "exporting"
        computed = not self._engines or any(engine.packs for engine in report.engines)
        self._worked |= bool(report.ranks) and computed
        return "training" if self._worked else "starting" if self._engines else "preparing"

    def _write_if_due(self, report: Report, state: str, stage: str) -> Status:
        """Write the status of a running attempt if it is due, and return it. A full disk does not end the run."""
        status = self._status(report, state, stage, idle=self._idle.look(report, time.monotonic()))
        if not self._pace.due(status, time.monotonic()):
            return status
        try:
            self._refuse_if_superseded(LOOK_FOR_SUCCESSOR_S)
            write_status(self.run_dir.status, status, durable=False)
        except OSError as error:
            if str(error) != self._unwritten:
                logger.error("STATUS NOT WRITTEN path=%s why=%s", self.run_dir.status, error)
            self._unwritten = str(error)
        else:
            self._unwritten = ""
        return status

    def _refuse_if_superseded(self, every_s: float = 0.0) -> None:
        """Raise if a later attempt has begun: this node may have been cut off and returned, and would write outdated
        files."""
        now = time.monotonic()
        if now - self._looked_for_successor < every_s:
            return
        self._looked_for_successor = now
        if self.run_dir.superseded(self.attempt):
            raise RunError(f"attempt {self.attempt + 1} has taken over")

    def _write(self, report: Report, state: str, stage: str, why: str = "") -> None:
        """Write the status of an attempt that ends, durably."""
        self._refuse_if_superseded()
        write_status(self.run_dir.status, self._status(report, state, stage, why))

    def _status(self, report: Report, state: str, stage: str, why: str = "", idle: str = "") -> Status:
        return Status(
            state=state,
            stage=stage,
            phase=report.phase.value,
            step=report.step,
            steps=report.steps,
            attempt=self.attempt,
            why=why or report.why,
            began=timestamp(self.began),
            updated=timestamp(),
            ran_s=round(time.monotonic() - self._began, 3),
            window=PackCounts(report.free, report.claimed, report.stored),
            store=StoreUse(report.stored_bytes, report.budget_bytes),
            engines=msgspec.convert(report.engines, tuple[EngineStatus, ...], from_attributes=True),
            ranks=report.ranks,
            waiting=tuple(who_waits(report)),
            lost=report.lost,
            failed=report.failed,
            refused=msgspec.to_builtins(report.refused),
            troubles=tuple(Unwritten(what, why) for what, why in report.troubles),
            void=tuple(VoidPack(f"{e}.{i}", why) for (e, i), why in report.void),
            idle=idle,
            answers=self._answers,
        )


def _failure_of(record: ExitRecord) -> RunError:
    kind = AttemptError if record.again else RunError
    return kind(f"{record.component}: {record.why}")

"""The head of an attempt, or of an attempt's first part, in which the target answers prompts.

It reads the rows, hands them out to engines, saves the answers, writes the status, and alone decides when it is over.
Engines may join and vanish at any time.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from dataclasses import dataclass

import msgspec
import psutil

from specbatch.config import Config, load_config
from specbatch.corpus.forms import RowReader
from specbatch.corpus.sources import find_sources
from specbatch.dispatch.connection_file import ConnectionFile, Keys, publish
from specbatch.dispatch.messages import Phase, Report
from specbatch.dispatch.server import Server
from specbatch.errors import AttemptError, RunError
from specbatch.regenerate.engine import LEFT
from specbatch.regenerate.prompts import PromptDispatcher
from specbatch.regenerate.rows import count_rows, read_rows
from specbatch.regenerate.shards import Shards, Superseded, finished
from specbatch.regenerate.speaker import UNENDED
from specbatch.run.events import Events
from specbatch.run.exit_records import ExitRecord, exit_record_names, read_exit_record, write_exit_record
from specbatch.run.heartbeat import SILENT_S
from specbatch.run.owner import owner
from specbatch.run.progress import answered_text
from specbatch.run.run_log import RunLog
from specbatch.run.signals import on_signal
from specbatch.run.status_pace import StatusPace
from specbatch.rundir import RunDir
from specbatch.status_file import AnswerCounts, EngineStatus, PackCounts, Status, write_status
from specbatch.timestamps import timestamp

logger = logging.getLogger(__name__)
TICK_S = 0.3
GRACE_S = 20.0
"""Seconds that engines may take to receive that they may exit."""
LOOK_FOR_SUCCESSOR_S = 15.0
STAGE = "answering"
ENDING = "raise data.regenerate.max_new_tokens, or set data.regenerate.unfinished: keep"
"""What to do about answers without an end."""


def answers_first(run_dir: RunDir, config: Config) -> bool:
    """Return whether prompts have to be answered before anything else of the run can start."""
    wanted = config.run.goal == "answers" or config.data.regenerate.answers > 0
    return wanted and not finished(run_dir, config)


def answer_all(run_dir: RunDir, attempt: int, host: str) -> bool:
    """Lead the answering until it ends.

    Args:
        host: address of this node, on which the dispatcher listens.

    Returns:
        whether all prompts are answered; False if the run was asked to stop.

    Raises:
        UserError: the data can't be read, or has changed.
        AttemptError: it failed, but another attempt may succeed.
        RunError: it failed for good.
    """
    config = load_config(run_dir.config)
    sources = find_sources(config.data.train, RowReader(config.data).columns)
    shards = Shards(run_dir, attempt, config, count_rows(run_dir, config))
    dispatcher = PromptDispatcher(
        shards.missing(read_rows(sources)),
        shards.keep,
        total=shards.total,
        done=shards.counts.done,
        heartbeat_s=config.inference.heartbeat_s,
    )
    keys, events = Keys.new(), Events(run_dir.events(attempt))
    run = os.urandom(8).hex()
    server = Server(
        dispatcher, keys, host, run=run, attempt=attempt, event=events.write, remove_prefix=lambda prefix: None
    )
    rendezvous = ConnectionFile.new(
        keys,
        run=run,
        attempt=attempt,
        host=host,
        dispatcher_port=server.port,
        work="prompts",
    )
    with contextlib.closing(events), server:
        publish(run_dir.rendezvous(attempt), rendezvous)
        return _Watch(run_dir, attempt, config, server, shards).until_the_end()


@dataclass(frozen=True)
class Progress:
    """The number of finished prompts at a time."""

    done: int
    tokens: int


class _Watch:
    """Follows the answering, writes its status, and decides when it is over."""

    def __init__(self, run_dir: RunDir, attempt: int, config: Config, server: Server, shards: Shards) -> None:
        self.run_dir, self.attempt, self.config = run_dir, attempt, config
        self.server, self.shards = server, shards
        self.began, self._began = time.time(), time.monotonic()
        self._before = Progress(shards.counts.done, shards.counts.tokens)
        self._ready: float | None = None
        """When the first engine was ready."""
        self._progress = (shards.counts.done, time.monotonic())
        self._ended: dict[str, ExitRecord | None] = {}
        self._owner: psutil.Process | None = owner()
        self._pace = StatusPace() if self._owner is None else StatusPace(0.0, 1.0)
        self._looked_for_successor = -math.inf
        self._unwritten = ""
        on_signal(self.drain)

    def drain(self, why: str) -> None:
        """End the attempt; unfinished prompts are answered again later."""
        logger.info("draining why=%s", why)
        self.server.drain(why)

    def until_the_end(self) -> bool:
        """Run until the end. Returns and raises the same as `answer_all`."""
        with RunLog(self.run_dir, self.config, told_elsewhere=self._owner is not None) as log:
            while True:
                report, records = self.server.report(), self._records()
                failed = self._failure(report, records)
                if failed is not None:
                    self._fail(report, failed)
                ended = all(record is not None for record in records.values())
                if report.phase is Phase.TRAINED or (report.phase is Phase.STOP and ended):
                    return self._end(report, log)
                if self._owner is not None and not self._owner.is_running():
                    self.drain("the process that started this run is gone")
                    self._owner = None
                log.look(self._write_if_due(report, "stopping" if report.phase is Phase.STOP else "running"))
                time.sleep(TICK_S)

    def _end(self, report: Report, log: RunLog) -> bool:
        """Finish after the last answer or a request to stop: wait until all finished shards are in place. A run that
        would train on answers fails if there are none."""
        try:
            self.shards.finish()
        except OSError as error:
            self._fail(report, _of_disk(error))
        whole, counts = report.phase is Phase.TRAINED, self._counts(report)
        if whole:
            log.answered(counts)
            if self.config.run.goal == "draft" and not counts.written:
                hint = f"; {ENDING}" if UNENDED in counts.refused else ""
                self._fail(report, RunError(f"there is nothing to train on: {answered_text(counts)}{hint}"))
        self._let_engines_leave()
        if whole and self.config.run.goal == "draft":
            write_status(self.run_dir.status, self._status(report, "running", "preparing"))
            return True
        write_status(self.run_dir.status, self._status(report, "completed" if whole else "stopped", "done", report.why))
        return whole

    def _let_engines_leave(self) -> None:
        """Serve engines, including added ones, until each has received that it may exit."""
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until:
            there = [engine for engine in self.server.report().engines if engine.state != LEFT]
            if not any(engine.last_heard_s < GRACE_S for engine in there):
                return
            time.sleep(TICK_S)

    def _records(self) -> dict[str, ExitRecord | None]:
        """Return how each of the run's own engines ended; None for those that have not."""
        there, silent = exit_record_names(self.run_dir, self.attempt), self.server.silent()
        for task in range(self.config.inference.engines):
            name = f"inference-{task}"
            if self._ended.get(name) is None:
                found = read_exit_record(self.run_dir, self.attempt, "inference", task) if name in there else None
                self._ended[name] = found
            if self._ended[name] is None and silent.get(name, 0.0) > SILENT_S:
                why = f"{name} has not reported for {silent[name]:.0f} s"
                self._ended[name] = lost = ExitRecord("inference", task, why, again=True)
                write_exit_record(self.run_dir, self.attempt, lost)
        return self._ended

    def _failure(self, report: Report, records: dict[str, ExitRecord | None]) -> RunError | None:
        """Return why the attempt can't continue; None while it can."""
        if report.error:
            return RunError(report.error)
        if report.phase is Phase.WORK and all(record is not None for record in records.values()):
            broken = next((record for record in records.values() if record and record.failed), None)
            if broken is None:
                return AttemptError("inference: all engines have ended")
            return (AttemptError if broken.again else RunError)(f"inference: {broken.why}")
        done, since = self._progress
        now, ready = time.monotonic(), any(engine.state == "ready" for engine in report.engines)
        # Only engines that are ready claim prompts.
        self._ready = self._ready or (now if report.claimed or report.step > self._before.done else None)
        if report.step != done or not ready:
            self._progress = (report.step, now)
        elif now - since > max(self.config.run.stall_timeout_s, self._longest_s()) and report.phase is Phase.WORK:
            return AttemptError(f"no prompt was answered for {now - since:.0f} s")
        return None

    def _longest_s(self) -> float:
        """Return the seconds that the longest answer may take, at ten tokens per second."""
        return self.config.data.regenerate.max_new_tokens / 10

    def _fail(self, report: Report, failure: RunError) -> None:
        self.drain(str(failure))
        self._let_engines_leave()
        with contextlib.suppress(OSError):
            self.shards.finish()
        self._refuse_if_superseded()
        write_status(self.run_dir.status, self._status(report, "failed", "done", str(failure)))
        raise failure

    def _refuse_if_superseded(self) -> None:
        """Raise if a later attempt has begun: this node may have been cut off and returned, and would write outdated
        files."""
        if self.run_dir.superseded(self.attempt):
            raise RunError(f"attempt {self.attempt + 1} has taken over")

    def _write_if_due(self, report: Report, state: str) -> Status:
        status, now = self._status(report, state, STAGE), time.monotonic()
        if not self._pace.due(status, now):
            return status
        if now - self._looked_for_successor > LOOK_FOR_SUCCESSOR_S:
            self._looked_for_successor = now
            self._refuse_if_superseded()
        try:
            write_status(self.run_dir.status, status, durable=False)
        except OSError as error:
            if str(error) != self._unwritten:
                logger.error("STATUS NOT WRITTEN path=%s why=%s", self.run_dir.status, error)
            self._unwritten = str(error)
        return status

    def _answered_s(self) -> float:
        """Return the seconds from the first ready engine to the last answer; at least one, so that rates are not
        accidental."""
        return 1.0 if self._ready is None else max(1.0, self._progress[1] - self._ready)

    def _counts(self, report: Report) -> AnswerCounts:
        seconds, counts = self._answered_s(), self.shards.counts
        return AnswerCounts(
            done=report.step,
            of=report.steps,
            written=counts.written,
            refused=dict(counts.refused),
            ways=dict(counts.ways),
            tokens=counts.tokens,
            tokens_per_s=round((counts.tokens - self._before.tokens) / seconds, 1),
            per_s=round((report.step - self._before.done) / seconds, 3),
        )

    def _status(self, report: Report, state: str, stage: str, why: str = "") -> Status:
        answers = self.config.run.goal == "answers"
        return Status(
            state=state,
            stage=stage,
            phase=report.phase.value,
            step=report.step if answers else 0,
            steps=report.steps if answers else 0,
            attempt=self.attempt,
            why=why or report.why,
            began=timestamp(self.began),
            updated=timestamp(),
            ran_s=round(time.monotonic() - self._began, 3),
            window=PackCounts(report.free, report.claimed, report.stored),
            engines=msgspec.convert(report.engines, tuple[EngineStatus, ...], from_attributes=True),
            failed=report.failed,
            refused=msgspec.to_builtins(report.refused),
            answers=self._counts(report),
        )


def _of_disk(error: OSError) -> RunError:
    return RunError(str(error)) if isinstance(error, Superseded) else AttemptError(f"answers can't be written: {error}")

"""``specbatch replay RUN --source recording``: a draft trained on recorded steps by processes of this machine, watched
in the foreground. The run directory is as any other: `specbatch status`, `logs`, `cancel` and `resume` know it.

Ctrl-C once stops after the present step, with a snapshot; twice ends everything at once.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from rich.console import Console

from specbatch.config import Config, load_config
from specbatch.config.change import changes
from specbatch.corpus import make_plan, open_corpus
from specbatch.errors import RunError, UserError
from specbatch.launch.change import tell_changes
from specbatch.launch.history import begin_attempt, read_attempt
from specbatch.launch.interrupts import Interrupts
from specbatch.launch.local import DONE, INTERRUPTED, STOPPED
from specbatch.launch.marks import Mark, leave_mark
from specbatch.launch.progress import Display, MetricsTail
from specbatch.registry import register
from specbatch.replay import Source, begin_anew, go_on_anew, last_step, train
from specbatch.rundir import RunDir, write_json
from specbatch.snapshot.folder import whole_snapshots
from specbatch.training.replay_rank import Order

log = logging.getLogger(__name__)

POLL_S = 0.25
WRITE_S = 1.0
"""Between two writes of the status."""


def train_anew(recorded: RunDir, out: RunDir, overrides: Sequence[str]) -> int:
    """Train a draft on the recorded steps of a run, or go on with that, and export it.

    Args:
        out: its run directory.
        overrides: settings other than the recorded run's.

    Returns:
        exit code: 0 done, 75 stopped with a snapshot, 130 ended at once by the user.

    Raises:
        UserError: nothing is recorded, a setting can't be another one than when it was, or it is being trained already.
        RunError: training failed; with the log's last words.
    """
    return _train(out, *_begin(out, lambda: begin_anew(recorded, out, overrides)))


def resume(out: RunDir, overrides: Sequence[str]) -> int:
    """Go on with what `train_anew` began. Returns and raises as that.

    Args:
        overrides: settings that are different from now on.
    """
    return _train(out, *_begin(out, lambda: go_on_anew(out, overrides)))


def _begin(out: RunDir, begin: Callable[[], tuple[Config, Source]]) -> tuple[Config, Source]:
    """Make the run directory ready, and keep ``provenance.json``: what the draft is made from, and what was changed."""
    from specbatch.launch.provenance import provenance
    from specbatch.target import fingerprint, read_target
    from specbatch.training.replay import RepeatedPlan

    _refuse_if_it_runs(out)
    before = load_config(out.config) if out.config.exists() else None
    config, source = begin()
    if not out.provenance.exists():
        target, corpus = fingerprint(read_target(config.target.path)), open_corpus(out)
        recorded = make_plan(load_config(RunDir(Path(source.run)).config), corpus)
        plan = RepeatedPlan(recorded, first=source.first, count=source.count, epochs=config.training.epochs)
        made_from = provenance(config.target.path, target, corpus.fingerprint, plan.fingerprint)
        write_json(out.provenance, {**made_from, "recording": msgspec.to_builtins(source)})
    elif before is not None:
        tell_changes(out, changes(before, config))
    return config, source


def _refuse_if_it_runs(out: RunDir) -> None:
    newest = read_attempt(out, max(out.attempts(), default=0))
    if newest is not None and newest.lives():
        raise UserError(
            f"{out.root}: process {newest.pid} trains this draft just now; let it end, or end it by `specbatch cancel`"
        )


def _train(out: RunDir, config: Config, source: Source) -> int:
    from specbatch.export import export

    register(out)
    out.cancelled.unlink(missing_ok=True)
    attempt, steps = max(out.attempts(), default=0) + 1, last_step(config, source)
    folder = out.attempt(attempt)
    folder.mkdir(parents=True, mode=0o700)
    begin_attempt(out, attempt)
    logs = out.component_log(attempt, "training", 0).parent
    logs.mkdir()
    order = Order(
        source.run, str(logs), source.first, source.count,
        out=str(out.root), last_step=steps, attempt=attempt, stop=str(folder / "stop"),
    )  # fmt: skip
    with (
        Interrupts(end=True) as interrupts,
        Display(out.log, config.run.log_interval_s, Console(stderr=True, highlight=False)) as display,
        _Watch(out, order, source, interrupts, display) as watch,
    ):
        try:
            train(order, folder, config.training.ranks)
            if max(whole_snapshots(out.snapshots), default=0) < steps:
                watch.end("stopped", "asked to stop")
                print(f"stopped at step {watch.step}; go on with the same command, or: {_resume(out)}")
                return STOPPED
            watch.stage = "exporting"
            draft = export(out)
        except (UserError, RunError) as error:
            leave_mark(out, attempt, Mark("training", 0, str(error)))
            watch.end("failed", str(error))
            raise
        except KeyboardInterrupt:
            watch.end("stopped", "ended at once; what was trained since the last snapshot is lost")
            print(f"ended at once; go on with the same command, or: {_resume(out)}")
            return INTERRUPTED
        watch.end("completed", "")
    print(draft)
    return DONE


def _resume(out: RunDir) -> str:
    shown = os.path.relpath(out.root) if out.root.is_relative_to(Path.cwd()) else str(out.root)
    return f"specbatch resume {shlex.quote(shown)}"


class _Watch(threading.Thread):
    """Shows how far the training is, writes the status, passes on that somebody asked to stop; a context manager."""

    def __init__(self, out: RunDir, order: Order, source: Source, interrupts: Interrupts, display: Display) -> None:
        super().__init__(name="watch", daemon=True)
        self.stage = "preparing"
        self._out, self._order, self._source = out, order, source
        self._interrupts, self._display = interrupts, display
        self._metrics = MetricsTail(out.metrics)
        before = self._metrics.read()
        self.step: int = before[-1]["step"] if before else 0
        self._began, self._written, self._unwritten = _now(), 0.0, ""
        self._over = threading.Event()

    def __enter__(self) -> _Watch:
        self._look()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self.join()

    def end(self, state: str, why: str) -> None:
        """Write how it ended."""
        self._over.set()
        self.join()
        self._look()
        self._write(state, why)

    def run(self) -> None:
        while not self._over.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        rows = self._metrics.read()
        if rows:
            self.step = rows[-1]["step"]
        if rows and self.stage == "preparing":
            self.stage = "training"
        self._display.stage(self.stage)
        if self.stage == "training":
            self._display.training({"step": self.step, "steps": self._order.last_step}, rows)
        asked = self._interrupts.asked > 0
        if asked:
            with contextlib.suppress(OSError):  # a full disk: once more, a little later
                Path(self._order.stop).touch()
        if time.monotonic() - self._written >= WRITE_S:
            self._write("stopping" if asked else "running", "asked to stop" if asked else "")

    def _write(self, state: str, why: str) -> None:
        """Write the status; a full disk does not end the training."""
        if self._out.superseded(self._order.attempt):
            return
        status: dict[str, Any] = {
            "state": state,
            "stage": self.stage if state in ("running", "stopping") else "done",
            "step": self.step,
            "steps": self._order.last_step,
            "attempt": self._order.attempt,
            "why": why,
            "began": self._began,
            "updated": _now(),
            "recording": msgspec.to_builtins(self._source),
        }
        self._written = time.monotonic()
        try:
            write_json(self._out.status, status)
        except OSError as error:
            if str(error) != self._unwritten:
                log.error("STATUS NOT WRITTEN path=%s why=%s", self._out.status, error)
            self._unwritten = str(error)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")

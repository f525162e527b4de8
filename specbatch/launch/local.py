"""``specbatch run`` and ``specbatch resume``: the components as local processes, watched in the foreground.

Ctrl-C once asks the dispatcher to stop at the next step, with a snapshot; twice ends everything at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specbatch.config import Config, dump_config
from specbatch.config.change import STEPS
from specbatch.errors import RunError, UserError
from specbatch.evaluations import evaluations
from specbatch.launch.change import change_settings
from specbatch.launch.history import begin_attempt
from specbatch.launch.interrupts import Interrupts
from specbatch.launch.marks import read_mark
from specbatch.launch.prepare import prepare
from specbatch.launch.progress import Display, MetricsTail
from specbatch.patience import Patience
from specbatch.registry import register
from specbatch.rundir import RunDir, read_json, write_whole
from specbatch.training.metrics_file import last_step

if TYPE_CHECKING:
    from specbatch.launch.processes import Components

DONE, FAILED, STOPPED = 0, 1, 75
INTERRUPTED = 130
POLL_S = 0.25


def run(config: Config) -> int:
    """Prepare a new run directory and run all of it here.

    Returns:
        exit code: 0 done, 1 failed, 75 stopped with a snapshot, 130 ended at once by the user.

    Raises:
        UserError: the configuration can't work, or the run directory is another run's.
    """
    from specbatch.checks import check

    run_dir = RunDir(Path(config.run.dir).absolute())
    for warning in check(config):
        print(f"specbatch: warning: {warning}", file=sys.stderr)
    run_dir.root.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir.config, dump_config(config).encode())
    return _run(run_dir, config)


def resume(root: Path, overrides: Sequence[str] = ()) -> int:
    """Go on with a run where its newest whole snapshot stands. Returns and raises as `run`.

    Args:
        overrides: settings that are different from now on.
    """
    run_dir = RunDir(root.absolute())
    if not run_dir.config.exists():
        raise UserError(f"{root}: no run directory: it has no config.yaml; start a run with `specbatch run`")
    config, changed = change_settings(run_dir, overrides)
    for change in changed:
        print(f"{change.field} was {change.was} and is {change.now}")
    status = read_json(run_dir.status) or {}
    if status.get("state") == "completed" and STEPS not in [change.field for change in changed]:
        print(f"{root}: this run is complete: its draft is in {run_dir.export}")
        return DONE
    return _run(run_dir, config)


def _run(run_dir: RunDir, config: Config) -> int:
    register(run_dir)
    run_dir.cancelled.unlink(missing_ok=True)
    with Display(run_dir.log, config.run.log_interval_s) as display:
        display.stage("preparing")
        prepare(
            run_dir,
            config,
            lambda text, done, total: display.update(done, total, f"{text} {done}/{total}"),
            display.say,
        )
        patience = Patience(last_step(run_dir.metrics), config.run.max_restarts)
        with Interrupts() as interrupts:
            while True:
                attempt = max(run_dir.attempts(), default=0) + 1
                run_dir.attempt(attempt).mkdir(parents=True, mode=0o700)
                begin_attempt(run_dir, attempt)
                code = _Foreground(run_dir, config, attempt, display, interrupts).watch()
                why = _curable(run_dir, attempt) if code == FAILED and not _unwanted(run_dir, interrupts) else ""
                if not why or not patience.again(last_step(run_dir.metrics)):
                    break
                display.say(f"attempt {attempt} ended: {why}; another one goes on from the newest snapshot")
    _report(run_dir, code, display.seconds)
    return code


def _unwanted(run_dir: RunDir, interrupts: Interrupts) -> bool:
    """Whether somebody wants the run to end."""
    return interrupts.asked > 0 or run_dir.cancelled.exists()


def _curable(run_dir: RunDir, attempt: int) -> str:
    """Why an attempt failed that another one may do better; empty if none may."""
    head = read_mark(run_dir, attempt, "head", 0)
    if head is None:
        return "its head was killed"
    return head.why if head.again else ""


class _Foreground:
    """One attempt, from its first process to its last."""

    def __init__(self, run_dir: RunDir, config: Config, attempt: int, display: Display, interrupts: Interrupts) -> None:
        self.run_dir, self.config, self.attempt, self.display = run_dir, config, attempt, display
        self._interrupts = interrupts
        self._metrics = MetricsTail(run_dir.metrics)
        self._evaluated = max(evaluations(run_dir.metrics), default=0)
        self._told = False

    def watch(self) -> int:
        from specbatch.launch import processes
        from specbatch.launch.revival import Revival

        components = processes.start(self.run_dir, self.attempt, self.config)
        revival = Revival(self.run_dir, self.attempt, self.config, components)
        try:
            while components.running():
                if self._interrupts.asked > 1:
                    self.display.say("ended at once; what was trained since the last snapshot is lost")
                    return INTERRUPTED
                if self._interrupts.asked and not self._told:
                    self._told = self._drain()
                self._show()
                if "head" not in components.running():
                    return self._wait_for_the_rest(components)
                for news in revival.look():
                    self.display.say(news)
                time.sleep(POLL_S)
            return self._code()
        finally:
            components.kill()

    def _wait_for_the_rest(self, components: Components) -> int:
        """Components that outlive the head by more than a moment have nobody left to tell them to end.

        Where another attempt follows, nobody waits for them: the head did, or was killed.
        """
        head = read_mark(self.run_dir, self.attempt, "head", 0)
        until = time.monotonic() + (0 if head is None or head.again else 10)
        while components.running() and time.monotonic() < until:
            time.sleep(POLL_S)
        self._show()
        return self._code()

    def _show(self) -> None:
        status = read_json(self.run_dir.status) or {}
        if status.get("attempt") != self.attempt:
            self.display.stage("starting")
            return
        rows = self._metrics.read()
        self.display.evaluated(rows, after=self._evaluated)
        self.display.stage(status["stage"])
        if status["stage"] == "training":
            self.display.training(status, rows)
        elif status["stage"] == "starting":
            engines = ", ".join(f"{engine['name']} {engine['state']}" for engine in status["engines"])
            joined = f"{status['ranks']} of {self.config.training.ranks} ranks"
            self.display.update(0, 0, f"{engines or 'no engine yet'}, {joined}")
        else:
            self.display.update(0, 0, "")

    def _code(self) -> int:
        status = read_json(self.run_dir.status) or {}
        if status.get("attempt") != self.attempt:
            return FAILED
        return {"completed": DONE, "stopped": STOPPED}.get(status["state"], FAILED)

    def _drain(self) -> bool:
        """Tell the dispatcher, once there is one."""
        from specbatch.dispatch.client import Client
        from specbatch.dispatch.rendezvous import wait_for

        try:
            client = Client(wait_for(self.run_dir.rendezvous(self.attempt), self.attempt, 0.0), deadline_s=2.0)
        except RunError:
            return False
        with contextlib.closing(client), contextlib.suppress(RunError):
            client.drain("Ctrl-C")
            return True
        return False


def _report(run_dir: RunDir, code: int, seconds: dict[str, float]) -> None:
    """The last lines: what came out, or what to do."""
    shown = os.path.relpath(run_dir.root) if run_dir.root.is_relative_to(Path.cwd()) else str(run_dir.root)
    status = read_json(run_dir.status) or {}
    print("  ".join(f"{stage} {took:.0f} s" for stage, took in seconds.items()))
    if code == DONE:
        from specbatch.evaluate import summary_line

        evaluation = read_json(run_dir.evaluation)
        for warning in (evaluation or {}).get("warnings", []):
            print(f"specbatch: warning: {warning}", file=sys.stderr)
        print(summary_line(evaluation, run_dir.export) if evaluation else f"draft in {shown}/export")
    elif code in (STOPPED, INTERRUPTED):
        print(f"stopped at step {status.get('step', 0)}; go on with: specbatch resume {shlex.quote(shown)}")
    else:
        print(f"specbatch: {shown}: {status.get('why') or 'the run failed'}", file=sys.stderr)
        print(f"logs are in {shown}/attempts/{status.get('attempt', 1)}/logs", file=sys.stderr)

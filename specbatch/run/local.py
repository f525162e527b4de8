"""``specbatch run`` and ``specbatch resume``: the components as local processes, watched in the foreground.

Ctrl-C once asks the dispatcher to stop after the current step, with a snapshot; twice ends everything at once.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from specbatch.config import Config, dump_config, load_config
from specbatch.config.change import STEPS
from specbatch.errors import RunError, UserError
from specbatch.evaluation.history import evaluations
from specbatch.known_runs import register
from specbatch.metrics_lines import MetricsTail
from specbatch.restart_policy import RestartPolicy
from specbatch.run.alone import alone
from specbatch.run.answering import answers_first
from specbatch.run.attempts import begin_attempt
from specbatch.run.change import change_settings
from specbatch.run.exit_records import read_exit_record
from specbatch.run.interrupts import Interrupts
from specbatch.run.prepare import prepare, prepare_prompts
from specbatch.run.progress import Display
from specbatch.run.restarts import Restarts, reached
from specbatch.rundir import RunDir, as_typed, read_json, write_whole
from specbatch.slurm.allocation import Allocation, AttemptOnNodes, check_allocation, overrides_for
from specbatch.slurm.attempt import component_nodes
from specbatch.status_file import AnswerCounts, Status, is_complete, read_status
from specbatch.training.observers.tracked import sync_command

if TYPE_CHECKING:
    from specbatch.run.processes import Components

DONE, FAILED, STOPPED = 0, 1, 75
INTERRUPTED = 130
POLL_S = 0.25


def run(config: Config, allocation: Allocation | None = None) -> int:
    """Prepare a new run directory, and run everything from this process.

    Args:
        allocation: on whose nodes the components run; None: as processes of this machine.

    Returns:
        exit code: 0 done, 1 failed, 75 stopped with a snapshot, 130 ended at once by the user.

    Raises:
        UserError: the configuration can't work, or the run directory is another run's.
    """
    from specbatch.checks import check

    run_dir = RunDir(Path(config.run.dir).absolute())
    if allocation is None:
        _refuse_several_nodes(config)
    warnings = check(config, here=allocation is None)
    for warning in [*warnings, *(check_allocation(config, allocation) if allocation else [])]:
        print(f"specbatch: warning: {warning}", file=sys.stderr)
    run_dir.make()
    with alone(run_dir):
        write_whole(run_dir.config, dump_config(config).encode())
        return _run(run_dir, config, allocation)


def resume(root: Path, overrides: Sequence[str] = (), allocation: Allocation | None = None) -> int:
    """Continue a run from its newest complete snapshot. Returns and raises the same as `run`.

    Args:
        overrides: settings that change from now on.
        allocation: as for `run`.
    """
    run_dir = RunDir(root.absolute())
    if not run_dir.config.exists():
        raise UserError(f"{root}: is not a run directory: it has no config.yaml; start a run with `specbatch run`")
    with alone(run_dir):
        if allocation is not None:
            overrides = [*overrides, *overrides_for(load_config(run_dir.config, overrides), allocation)]
        config, changed = change_settings(run_dir, overrides, here=allocation is None)
        for warning in check_allocation(config, allocation) if allocation else []:
            print(f"specbatch: warning: {warning}", file=sys.stderr)
        for change in changed:
            print(f"{change.field} was {change.was} and is {change.now}")
        if is_complete(run_dir) and STEPS not in [change.field for change in changed]:
            made = "answers are" if config.run.goal == "answers" else "draft is"
            print(f"{root}: this run is complete: its {made} in {result_of(run_dir, config)}")
            return DONE
        return _run(run_dir, config, allocation)


def train_on_recording(recorded: RunDir, out: RunDir, overrides: Sequence[str]) -> int:
    """Train a new draft on the recorded steps of a run, or continue that. Returns and raises the same as `run`.

    Args:
        out: run directory of the new draft.
        overrides: settings that differ from the recorded run's.
    """
    from specbatch.run.from_recording import begin

    begin(recorded, out, overrides)
    return resume(out.root, [*overrides, f"--run.dir={out.root}"])


def _run(run_dir: RunDir, config: Config, allocation: Allocation | None) -> int:
    register(run_dir)
    run_dir.cancelled.unlink(missing_ok=True)
    # The standard output of `specbatch replay` is the draft's directory.
    console = Console(stderr=True, highlight=False) if run_dir.recording.exists() else None
    with Display(run_dir.log, config.run.log_interval_s, console) as display:
        display.stage("preparing")
        if answers_first(run_dir, config) or config.run.goal == "answers":
            prepare_prompts(run_dir, config)
        else:
            prepare(
                run_dir,
                config,
                lambda text, done, total: display.update(done, total, f"{text} {done}/{total}"),
                display.say,
            )
        policy = RestartPolicy(reached(run_dir), config.run.max_restarts)
        how = "with the saved answers" if config.run.goal == "answers" else "after this step, with a snapshot"
        with Interrupts(how) as interrupts:
            while True:
                attempt = max(run_dir.attempts(), default=0) + 1
                run_dir.attempt(attempt).mkdir(parents=True, mode=0o700)
                begin_attempt(run_dir, attempt, nodes=component_nodes(config) if allocation else None)
                code = _Foreground(run_dir, config, attempt, display, interrupts, allocation).watch()
                why = _curable(run_dir, attempt) if code == FAILED and not _unwanted(run_dir, interrupts) else ""
                if not why or not policy.again(reached(run_dir)):
                    break
                display.say(f"attempt {attempt} ended: {why}; another one continues from there")
    _report(run_dir, config, code, display.seconds)
    return code


def _unwanted(run_dir: RunDir, interrupts: Interrupts) -> bool:
    """Return whether the run was asked to end."""
    return interrupts.asked > 0 or run_dir.cancelled.exists()


def _curable(run_dir: RunDir, attempt: int) -> str:
    """Return why an attempt failed if another one may succeed; else empty."""
    head = read_exit_record(run_dir, attempt, "head", 0)
    if head is None:
        status = read_status(run_dir.status) or Status()
        refused = status.attempt == attempt and status.state == "failed"
        return "" if refused else "its head was killed"
    return head.why if head.again else ""


def _refuse_several_nodes(config: Config) -> None:
    nodes = config.inference.nodes_per_engine or 1
    if nodes > 1:
        raise UserError(
            f"inference.nodes_per_engine: {nodes}: `specbatch run` uses only this machine; leave it out, or use "
            "`specbatch submit`"
        )


class _Foreground:
    """One attempt in the foreground, from its first process to its last."""

    def __init__(
        self,
        run_dir: RunDir,
        config: Config,
        attempt: int,
        display: Display,
        interrupts: Interrupts,
        allocation: Allocation | None,
    ) -> None:
        self._allocation = allocation
        self.run_dir, self.config, self.attempt, self.display = run_dir, config, attempt, display
        self._interrupts = interrupts
        self._metrics = MetricsTail(run_dir.metrics)
        self._evaluated = max(evaluations(run_dir.metrics), default=0)
        self._told = False
        self._first_stage = "preparing" if run_dir.recording.exists() else "starting"

    def watch(self) -> int:
        components, restarts = self._start()
        try:
            while components.running():
                if self._interrupts.asked > 1:
                    self.display.say("ended at once; training since the last snapshot is lost")
                    return INTERRUPTED
                if self._interrupts.asked and not self._told:
                    self._told = self._drain(components)
                self._show()
                if "head" not in components.running():
                    return self._wait_for_the_rest(components)
                for news in restarts.look() if restarts else []:
                    self.display.say(news)
                time.sleep(POLL_S)
            return self._code()
        finally:
            components.kill()

    def _start(self) -> tuple[Components | AttemptOnNodes, Restarts | None]:
        """Start the components; return them, and what restarts them unless their script does that."""
        if self._allocation is not None:
            return AttemptOnNodes(self.run_dir, self.attempt, self.config, self._allocation), None
        from specbatch.run import processes

        components = processes.start(self.run_dir, self.attempt, self.config)
        return components, Restarts(self.run_dir, self.attempt, self.config, components)

    def _wait_for_the_rest(self, components: Components | AttemptOnNodes) -> int:
        """Wait a moment for components that outlive the head, and return the exit code. If another attempt follows, do
        not wait for them: the head has done so already, or was killed."""
        head = read_exit_record(self.run_dir, self.attempt, "head", 0)
        until = time.monotonic() + (0 if head is None or head.again else 10)
        while components.running() and time.monotonic() < until:
            time.sleep(POLL_S)
        self._show()
        return self._code()

    def _show(self) -> None:
        status = read_status(self.run_dir.status) or Status()
        if status.attempt != self.attempt:
            self.display.stage(self._first_stage)
            return
        rows = self._metrics.read()
        self.display.evaluated(rows, after=self._evaluated)
        self.display.stage(status.stage)
        if status.answers is not None and "answering" in self.display.seconds:
            self.display.answered(status.answers)
        if status.answers is not None and status.stage == "answering":
            self.display.answering(status.answers, status)
        elif status.stage == "training":
            self.display.training(status, rows)
        elif status.stage == self._first_stage:
            engines = ", ".join(f"{engine.name} {engine.state}" for engine in status.engines)
            parts = [] if status.stage == "preparing" else [engines or "no engine yet"]
            self.display.update(0, 0, ", ".join([*parts, f"{status.ranks} of {self.config.training.ranks} ranks"]))
        else:
            self.display.update(0, 0, "")

    def _code(self) -> int:
        status = read_status(self.run_dir.status) or Status()
        if status.attempt != self.attempt:
            return FAILED
        return {"completed": DONE, "stopped": STOPPED}.get(status.state, FAILED)

    def _drain(self, components: Components | AttemptOnNodes) -> bool:
        """Ask the dispatcher to stop, once there is one; return whether that was done."""
        from specbatch.dispatch.client import Client
        from specbatch.dispatch.connection_file import wait_for

        try:
            client = Client(wait_for(self.run_dir.rendezvous(self.attempt), self.attempt, 0.0), deadline_s=2.0)
        except RunError:
            return False
        with contextlib.closing(client), contextlib.suppress(RunError):
            client.drain("Ctrl-C")
            return True
        if isinstance(components, AttemptOnNodes):
            components.drain()
            return True
        return False


def result_of(run_dir: RunDir, config: Config) -> Path:
    """Return the path of a run's result."""
    return run_dir.answers if config.run.goal == "answers" else run_dir.export


def _report(run_dir: RunDir, config: Config, code: int, seconds: dict[str, float]) -> None:
    """Print the last lines: the results, or what to do."""
    shown = as_typed(run_dir.root)
    status, recorded = read_status(run_dir.status) or Status(), run_dir.recording.exists()
    answers = status.answers or AnswerCounts()
    if not recorded:
        print("  ".join(f"{stage} {took:.0f} s" for stage, took in seconds.items()))
    for reason, count in answers.refused.items():
        print(f"without an answer {count:,}: {reason}", file=sys.stderr)
    if code == DONE and recorded:
        print(run_dir.export)
    elif code == DONE and config.run.goal == "answers":
        print(f"{answers.written:,} conversations of {answers.of:,} in {shown}/answers")
    elif code == DONE:
        from specbatch.evaluation.summary import summary_line

        evaluation = read_json(run_dir.evaluation)
        for warning in (evaluation or {}).get("warnings", []):
            print(f"specbatch: warning: {warning}", file=sys.stderr)
        print(summary_line(evaluation, run_dir.export) if evaluation else f"draft in {shown}/export")
        if command := sync_command(run_dir):
            print(f"Weights & Biases kept the run offline; send it with: {command}")
    elif code in (STOPPED, INTERRUPTED):
        again = "continue with the same command, or" if recorded else "continue with"
        answering = config.run.goal == "answers" or (status.answers is not None and not status.steps)
        where = f"after {answers.done:,} answers" if answering else f"at step {status.step}"
        print(f"stopped {where}; {again}: specbatch resume {shlex.quote(shown)}")
    else:
        print(f"specbatch: {shown}: {status.why or 'the run failed'}", file=sys.stderr)
        print(f"logs are in {shown}/attempts/{status.attempt or 1}/logs", file=sys.stderr)

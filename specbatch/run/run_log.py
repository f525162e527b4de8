"""``run.log`` of a run under Slurm, written by the head, since there is no foreground process. Idle alarms are mailed,
too."""

from __future__ import annotations

import contextlib
import io
import time

from rich.console import Console

from specbatch.config import Config
from specbatch.evaluation.history import evaluations
from specbatch.metrics_lines import MetricsTail
from specbatch.run.mail import send_mail
from specbatch.run.progress import Display
from specbatch.rundir import RunDir
from specbatch.status_file import AnswerCounts, Status


class RunLog(contextlib.ExitStack):
    """Appends a line per interval, at each change of stage and at each idle alarm. A context manager.

    Args:
        told_elsewhere: whether the foreground process of ``specbatch run`` writes the log, so that nothing is written
            here.
    """

    def __init__(self, run_dir: RunDir, config: Config, told_elsewhere: bool) -> None:
        super().__init__()
        self._display: Display | None = None
        if not told_elsewhere:
            # The log is only written, not shown, so the console discards its output.
            display = Display(run_dir.log, config.run.log_interval_s, Console(file=io.StringIO(), quiet=True))
            self._display = self.enter_context(display)
        self._config, self._metrics = config, MetricsTail(run_dir.metrics)
        self._told = max(evaluations(run_dir.metrics), default=0)
        self._interval_s, self._looked = config.run.log_interval_s, float("-inf")
        self._stage = self._idle = ""

    def answered(self, answers: AnswerCounts) -> None:
        """Write how many prompts have an answer."""
        if self._display is not None:
            self._display.answered(answers)

    def look(self, status: Status) -> None:
        """Write lines that are due."""
        display, now = self._display, time.monotonic()
        if display is None:
            return
        if status.idle and not self._idle:
            display.say(f"IDLE: {status.idle}")
            send_mail(self._config, f"specbatch {self._config.run.name}: idle", f"{status.idle}\n\n")
        self._idle = status.idle
        if status.stage == self._stage and now - self._looked < self._interval_s:
            return
        self._stage, self._looked = status.stage, now
        rows = self._metrics.read()
        display.evaluated(rows, after=self._told)
        display.stage(status.stage)
        if status.answers is not None and status.stage == "answering":
            display.answering(status.answers, status)
        if status.stage == "training":
            display.training(status, rows)

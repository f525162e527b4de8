"""Shows a run to people: stages and a live line on a terminal, and one line per interval in a log file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.text import Text

from specbatch.evaluation.history import evaluation_text
from specbatch.metrics_lines import MetricsLine
from specbatch.status_file import AnswerCounts, Status

STAGES = {
    "answering": "answering prompts",
    "preparing": "preparing",
    "starting": "starting engines",
    "training": "training",
    "exporting": "exporting",
    "evaluating": "evaluating",
}
"""Stages of a run in order, with their names for people."""


class _Elapsed(ProgressColumn):
    """Column with the seconds of this stage."""

    def render(self, task: Any) -> Text:
        return Text(f"{task.elapsed or 0:5.0f} s")


class Display:
    """Shows a run on a terminal and in its log file. A context manager, which leaves no half-drawn line on the screen.

    Args:
        log: file that gets a line every ``interval_s`` seconds and at every change of stage.
        console: console for people. If it is not a terminal, it gets the log file's lines.
    """

    def __init__(self, log: Path, interval_s: float, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.interval_s = interval_s
        self._path = log
        self._file: TextIO | None = None
        self._stage = ""
        self._stage_began = self._last_line = time.monotonic()
        self._task: TaskID | None = None
        self._rows: list[MetricsLine] = []
        self._evaluated = 0
        self._answered = False
        self._bars = Progress(
            TextColumn("{task.description:16}"),
            BarColumn(bar_width=24),
            _Elapsed(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            auto_refresh=True,
            refresh_per_second=4,
        )
        self.seconds: dict[str, float] = {}
        """Duration of each stage so far."""

    def __enter__(self) -> Display:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", buffering=1)
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_stage()
        if self.console.is_terminal:
            self._bars.stop()
        if self._file:
            self._file.close()

    def stage(self, name: str) -> None:
        """Enter a stage, unless the run is already in it."""
        if name == self._stage or name not in STAGES:
            return
        self._end_stage()
        self._stage, self._stage_began = name, time.monotonic()
        self._task = self._bars.add_task(STAGES[name], total=None, text="")
        self._line(STAGES[name])

    def update(self, done: int, total: int, text: str) -> None:
        """Show the progress of the stage; a total of 0 means that it is unknown."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total or None, text=text)
        if time.monotonic() - self._last_line >= self.interval_s:
            self._line(f"{STAGES[self._stage]}: {text}" if text else STAGES[self._stage])

    def training(self, status: Status, rows: list[MetricsLine]) -> None:
        """Show the training from the head's status and new metrics."""
        self._rows = (self._rows + rows)[-20:]
        self.update(status.step, status.steps, training_text(status, self._rows))

    def answering(self, answers: AnswerCounts, status: Status) -> None:
        """Show how many prompts are answered."""
        self.update(answers.done, answers.of, answering_text(answers, status))

    def answered(self, answers: AnswerCounts) -> None:
        """Show how many prompts have an answer, once all were asked; later calls show nothing."""
        if not self._answered:
            self._answered = True
            self.say(answered_text(answers))

    def evaluated(self, rows: list[MetricsLine], after: int = 0) -> None:
        """Show the evaluations among metrics, each once: after a rewind they are repeated, with the same results.

        Args:
            after: evaluations up to this step were shown before.
        """
        for row in rows:
            if row.evaluation is not None and row.step > max(self._evaluated, after):
                self._evaluated = row.step
                self.say(f"held-out data after step {row.step}: {evaluation_text(row.evaluation)}")

    def say(self, text: str) -> None:
        """Show a message permanently."""
        if self.console.is_terminal:
            self._bars.console.print(text)
        self._line(text)

    def _end_stage(self) -> None:
        if not self._stage:
            return
        took = time.monotonic() - self._stage_began
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + took
        if self._task is not None:
            task = self._bars.tasks[self._bars.task_ids.index(self._task)]
            total = task.total or 1
            self._bars.update(self._task, total=total, completed=total)
            self._bars.stop_task(self._task)
        self._line(f"{STAGES[self._stage]} took {took:.1f} s")
        self._stage, self._task = "", None

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        if self._file:
            self._file.write(line + "\n")
        if not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)


def answered_text(answers: AnswerCounts) -> str:
    """Return one line about the prompts after the last of them: how many have an answer, and why others have none."""
    none = ", ".join(f"{count:,} {reason}" for reason, count in answers.refused.items())
    return f"{answers.written:,} of {answers.of:,} prompts have an answer" + (f"; the others: {none}" if none else "")


def answering_text(answers: AnswerCounts, status: Status) -> str:
    """Return one line about the answers: number, refused ones, rate, engines, time left.

    Args:
        status: the head's.
    """
    parts = [f"{answers.done:,}/{answers.of:,}"]
    refused = sum(answers.refused.values())
    parts += [f"{refused:,} without an answer"] if refused else []
    parts.append(f"{answers.tokens_per_s:.0f} tokens/s")
    ready = sum(engine.state == "ready" for engine in status.engines)
    parts.append(f"{ready} of {len(status.engines)} engines ready")
    if answers.per_s:
        left = int((answers.of - answers.done) / answers.per_s)
        parts.append(f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d} left")
    return ", ".join(parts)


def training_text(status: Status, rows: list[MetricsLine]) -> str:
    """Return one line about the training: step, loss, accuracy, rates, waiting, window, store, time left.

    Args:
        status: the head's.
        rows: metrics of the last steps.
    """
    step, steps = status.step, status.steps
    parts = [f"step {step}/{steps}"]
    if rows:
        seconds = sum(row.seconds for row in rows)
        waited = sum(row.wait_s for row in rows)
        parts += [
            "step skipped" if rows[-1].loss is None else f"loss {rows[-1].loss:.3f}",
            f"accuracy {sum(row.accuracy[0] or 0.0 for row in rows) / len(rows):.2f}",
            f"{sum(row.tokens for row in rows) / max(seconds, 1e-9):.0f} tokens/s",
            f"waited {100 * waited / max(seconds, 1e-9):.0f} %",
        ]
    window, store = status.window, status.store
    if store.budget_bytes:
        parts.append(f"window {window.free}+{window.claimed}+{window.stored}")
        parts.append(f"store {100 * store.stored_bytes / store.budget_bytes:.0f} %")
    if rows:
        left = (steps - step) * seconds / len(rows)
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    return ", ".join(parts)

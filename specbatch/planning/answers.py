"""Estimates how long the target will take to answer the prompts of the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specbatch.config import Config, load_config
from specbatch.corpus.forms import RowReader
from specbatch.corpus.sources import find_sources
from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.status_file import Status, read_status
from specbatch.units import count_text


@dataclass(frozen=True)
class AnswersBudget:
    """The amount of generated text, and the time that it takes."""

    rows: int
    answers: int
    tokens_per_answer: float
    measured: bool
    """Whether another run showed the length of answers; else each is assumed to have `max_new_tokens`."""
    engines: int
    engine_tokens_per_s: float | None
    """Tokens per second that one engine generates; None if unknown."""

    @property
    def hours(self) -> float | None:
        """Hours with all engines, without their start; None if unknown."""
        if self.engine_tokens_per_s is None:
            return None
        return self.answers * self.tokens_per_answer / (self.engines * self.engine_tokens_per_s) / 3600

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, by the names of their fields."""
        return {**asdict(self), "hours": self.hours}

    def lines(self) -> list[str]:
        """Return one line per finding, which begins with its name."""
        longest = "as in the other run" if self.measured else "at most"
        total = self.answers * self.tokens_per_answer
        rows = [
            ("prompts", f"{self.rows:,} rows, {self.answers:,} conversations to answer"),
            ("tokens", f"{self.tokens_per_answer:,.0f} for each, {longest}; {count_text(total)} in all"),
        ]
        if self.engine_tokens_per_s is None:
            known = "unknown; give --engine-tokens-per-s, or --like with a run that has answered prompts"
            rows.append(("engine", known))
        else:
            rows.append(("engine", f"{self.engine_tokens_per_s:,.0f} tokens/s each, {self.engines} of them"))
            rows.append(("time", f"{self.hours:,.2f} hours, plus the start of the engines"))
        return [f"{name:10}{text}" for name, text in rows]


def answers_budget(config: Config, like: Path | None, engine_tokens_per_s: float | None) -> AnswersBudget:
    """Estimate the work of answering.

    Args:
        like: a run that has answered prompts.
        engine_tokens_per_s: tokens per second that one engine generates, if known.

    Raises:
        UserError: the data can't be read, or that run has no answers.
    """
    asked = config.data.regenerate
    rows = sum(source.scan()[0] for source in find_sources(config.data.train, RowReader(config.data).columns))
    tokens, measured = float(asked.max_new_tokens), False
    if like is not None:
        run_dir = RunDir(like.absolute())
        found = (read_status(run_dir.status) or Status()).answers
        if found is None or not found.done:
            raise UserError(f"--like: {like} has answered no prompts; name a run that has, or leave it out")
        tokens, measured = found.tokens / found.done, True
        engines = load_config(run_dir.config).inference.engines
        engine_tokens_per_s = engine_tokens_per_s or found.tokens_per_s / engines or None
    answers = rows * max(1, asked.answers)
    return AnswersBudget(rows, answers, tokens, measured, config.inference.engines, engine_tokens_per_s)

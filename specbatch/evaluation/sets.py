"""Prompts of benchmarks from files as their authors publish them: JSON lines, plain or gzipped.

The columns of a file's first row identify its benchmark. Each question is one user turn; for MT-Bench, whose second
turns follow the model's own first answer, the first turn.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specbatch.errors import UserError


@dataclass(frozen=True)
class Form:
    """Format of a benchmark's rows."""

    title: str
    columns: tuple[str, ...]
    """Columns that identify it."""
    question: Callable[[dict[str, Any]], Any]


FORMS = (
    Form("MT-Bench", ("question_id", "turns"), lambda row: (row["turns"] or [None])[0]),
    Form("HumanEval", ("task_id", "prompt"), lambda row: row["prompt"]),
    Form("GSM8K", ("question", "answer"), lambda row: row["question"]),
)


def read_set(name: str, path: Path) -> list[str]:
    """The questions of a benchmark, in the file's order.

    Args:
        name: its name in the configuration.

    Raises:
        UserError: the file is missing or empty, its rows match no known benchmark, or one of them is damaged.
    """
    where = f"evaluate.sets.{name}: {path}"
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: can't be read as lines of JSON: {error}") from error
    rows = [(number, _row(where, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{where}: has no rows")
    form = next((form for form in FORMS if rows[0][1].keys() >= {*form.columns}), None)
    if form is None:
        known = "; ".join(f"{form.title}: {', '.join(form.columns)}" for form in FORMS)
        raise UserError(
            f"{where}: row {rows[0][0]} has the columns {', '.join(rows[0][1]) or 'none'}, which match no known "
            f"benchmark ({known}); give conversations as data.heldout instead"
        )
    return [_question(where, number, row, form) for number, row in rows]


def read_sets(sets: Mapping[str, str]) -> dict[str, list[str]]:
    """The questions of all benchmarks. Raises as `read_set`."""
    return {name: read_set(name, Path(path)) for name, path in sets.items()}


def _row(where: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: row {number} is not JSON: {error.msg}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: row {number} is not a JSON object")
    return row


def _question(where: str, number: int, row: dict[str, Any], form: Form) -> str:
    missing = [column for column in form.columns if column not in row]
    if missing:
        raise UserError(f"{where}: row {number} has no {missing[0]}, which rows of {form.title} have")
    try:
        question = form.question(row)
    except (TypeError, KeyError):
        question = None
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: row {number} has no question: its {form.columns[-1]} of {form.title} is not text")
    return question

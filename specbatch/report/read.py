"""Reads runs into one document, with the user's other runs as references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specbatch.errors import UserError
from specbatch.known_runs import known_runs
from specbatch.report.document import Document, document
from specbatch.report.reading import RunRecord, read_run

MOST_OTHERS = 8
"""Most earlier runs that are read as references, the newest ones."""


def read_report(paths: Sequence[Path]) -> Document:
    """Read runs, and the newest of the user's other runs as references.

    Raises:
        UserError: one of the paths is not a run directory, or damaged.
    """
    return document([read_run(path) for path in paths], _others({path.absolute() for path in paths}))


def _others(shown: set[Path]) -> list[RunRecord]:
    found = []
    for run_dir in known_runs():
        if run_dir.root not in shown and run_dir.metrics.is_file():
            found.append((run_dir.metrics.stat().st_mtime, run_dir.root))
    runs = []
    for _, path in sorted(found, reverse=True)[:MOST_OTHERS]:
        try:
            runs.append(read_run(path))
        except UserError:
            # Damaged, or deleted meanwhile: not a reference.
            continue
    return runs

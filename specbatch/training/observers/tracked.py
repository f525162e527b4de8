"""Where trackers keep a run, and what remains to be done with it. Does not need the trackers' packages."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from specbatch.metrics_lines import MetricsLine
from specbatch.rundir import RunDir

OFFLINE = "offline-run-*"
"""Folders in which Weights & Biases keeps unsent data."""


def sync_command(run_dir: RunDir) -> str:
    """Return the command that sends what Weights & Biases kept offline; empty if there is nothing to send."""
    kept = run_dir.trackers / "wandb"
    if not any(kept.glob(OFFLINE)):
        return ""
    shown = os.path.relpath(kept) if kept.is_relative_to(Path.cwd()) else str(kept)
    return f"wandb sync {shlex.quote(shown)}/{OFFLINE}"


def scalars(line: MetricsLine) -> dict[str, float]:
    """Return the finite numbers of a step, by the names that trackers show."""
    found: dict[str, float | None] = {
        "loss": line.loss,
        "grad_norm": line.grad_norm,
        "learning_rate": line.learning_rate,
        "tokens_per_s": line.tokens_per_s,
        "void_packs": line.void_packs,
        "time/seconds": line.seconds,
        "time/wait_s": line.wait_s,
        "time/snapshot_s": line.snapshot_s,
    }
    found |= {f"loss/{term}": value for term, value in zip(line.terms, line.losses, strict=False)}
    found |= {f"accuracy/{term}": value for term, value in zip(line.terms, line.accuracy, strict=False)}
    if line.evaluation:
        found |= {f"heldout/{name}": line.evaluation.get(name) for name in ("loss", "acceptance_length")}
        heldout = zip(line.terms, line.evaluation["accuracy"], strict=False)
        found |= {f"heldout/accuracy/{term}": value for term, value in heldout}
    return {name: float(value) for name, value in found.items() if value is not None}

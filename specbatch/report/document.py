"""Everything that a page shows, as one JSON document. The page's program only draws it."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from specbatch import __version__
from specbatch.report.history import History, read_history
from specbatch.report.planned import planned
from specbatch.report.reading import RunRecord
from specbatch.report.references import Reference, curve, earlier, project_references
from specbatch.report.rules import RULES, judge
from specbatch.report.spent import PARTS, Spent, node_hours, spent
from specbatch.report.thin import Buckets, buckets, most_buckets

DIGITS = 4
"""Significant digits of a curve's values."""
Document = dict[str, Any]


def document(runs: Sequence[RunRecord], others: Sequence[RunRecord] = ()) -> Document:
    """Return the document of some runs.

    Args:
        runs: the runs to show, in this order.
        others: earlier runs of the user; those with the same target serve as references.
    """
    most = most_buckets(len(runs))
    return {
        "version": __version__,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parts": PARTS,
        "rules": list(RULES),
        "runs": [_run(run, most, earlier(run, [*others, *runs]), alone=len(runs) == 1) for run in runs],
        "differences": _differences(runs) if len(runs) > 1 else [],
    }


def _run(run: RunRecord, most: int, own: list[Reference], *, alone: bool) -> Document:
    """One run. Events and reference curves are included only if it is shown alone."""
    history = read_history(run)
    cut = buckets(len(run.metrics), most)
    references = [*own, *project_references()]
    findings, unknown = judge(run, references)
    times = spent(run, history)
    return {
        "name": run.name,
        "path": str(run.path),
        "state": run.status.state,
        "stage": run.status.stage,
        "why": run.status.why,
        "updated": run.status.updated,
        "steps": run.status.steps,
        "step": int(run.metrics.step_S[-1]) if len(run.metrics) else run.status.step,
        "tokens": int(run.metrics.tokens_S.sum()),
        "terms": run.metrics.terms,
        "facts": _facts(run),
        "packages": run.provenance.get("packages") or {},
        "measured": _measured(run),
        "curves": _curves(run, history, cut),
        "evaluations": _evaluations(run),
        "marks": [asdict(mark) for mark in history.marks if alone],
        "attempts": [_attempt(each, history) for each in times],
        "node_hours": {name: _short(hours) for name, hours in node_hours(times).items()},
        "plan": _plan(run, times),
        "findings": [asdict(finding) for finding in findings],
        "unknown": unknown,
        "reference_curves": _reference_curves(run, references) if alone else [],
        "answers": (run.evaluation or {}).get("answers") or [],
    }


def _reference_curves(run: RunRecord, references: Sequence[Reference]) -> list[Document]:
    """The run's accuracy over tokens, followed by that of references."""
    tokens_N, accuracy_N = curve(run)
    mine = {"name": run.name, "kind": "this", "x": _list(tokens_N, 6), "y": _list(accuracy_N)}
    return [mine] + [
        {
            "name": each.name,
            "kind": "own" if each.own else "project",
            "source": each.source,
            "x": _list(each.tokens_N, 6),
            "y": _list(each.accuracy_N),
        }
        for each in references
    ]


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """Name and value of what a run was made from, for people."""
    made, train = run.provenance, run.corpus.get("train") or {}
    target = str(made.get("target") or run.setting("target.path", ""))
    vocabulary = run.setting("draft.vocab_size", 32000)
    size = f"{vocabulary:,} tokens" if isinstance(vocabulary, int) else "the target's vocabulary"
    start = run.setting("draft.init_from")
    facts = [
        ("Target", Path(target).name or target),
        ("Draft", f"{run.setting('draft.algorithm', '-')}, {len(run.metrics.terms)} terms, {size}"),
        ("Starts from", str(start) if start else ""),
        (
            "Corpus",
            f"{train['samples']:,} samples, {train['tokens']:,} tokens, {train['loss_tokens']:,} of them learnt"
            if {"samples", "tokens", "loss_tokens"} <= train.keys()
            else "",
        ),
        (
            "Layout",
            f"engines: {run.setting('inference.engines', 1)}, trainer ranks: {run.setting('training.ranks', 1)}",
        ),
        ("specbatch", " ".join(filter(None, [made.get("specbatch"), str(made.get("git_revision") or "")[:12]]))),
        ("Started", str(made.get("time", ""))),
        ("Directory", str(run.path)),
    ]
    return [(name, value) for name, value in facts if value]


def _measured(run: RunRecord) -> Document | None:
    """The content of ``evaluation.json``; None before the measurement."""
    found = run.evaluation
    if found is None:
        return None
    keys = (
        "acceptance_length", "acceptance_rate", "draft_tokens", "prompts", "identical", "batch_size", "device", "dtype",
        "tokens_per_s_plain", "tokens_per_s_speculative", "training_accuracy", "verify_steps", "sglang", "note",
        "warnings", "acceptance_length_definition", "acceptance_length_interval", "differences", "sweep",
    )  # fmt: skip
    measured = {key: found.get(key) for key in keys}
    plain, speculative = found.get("tokens_per_s_plain"), found.get("tokens_per_s_speculative")
    return measured | {"speed_up": speculative / plain if plain and speculative else None}


def _curves(run: RunRecord, history: History, cut: Buckets) -> Document:
    """Curves over buckets of steps: means, and least and greatest where a bucket has several steps."""
    metrics = run.metrics
    seconds = metrics.scalars["seconds"]
    with np.errstate(invalid="ignore", divide="ignore"):
        waited_S = np.clip(metrics.scalars["wait_s"] / seconds, 0, 1)
    columns: dict[str, np.ndarray] = {
        "loss": metrics.scalars["loss"],
        **{f"loss/{k}": metrics.losses_SK[:, k] for k in range(len(metrics.terms))},
        **{f"accuracy/{k}": metrics.accuracy_SK[:, k] for k in range(len(metrics.terms))},
        "learning_rate": metrics.scalars["learning_rate"],
        "grad_norm": metrics.scalars["grad_norm"],
        "tokens_per_s": metrics.scalars["tokens_per_s"],
        "waited": waited_S,
        "store": history.store_S / 2**30,
    }
    found: Document = {
        "size": int((cut.end_N - cut.first_N).max()) if len(cut) else 1,
        "step": cut.last(metrics.step_S).tolist() if len(cut) else [],
        "tokens": cut.last(np.cumsum(metrics.tokens_S)).tolist() if len(cut) else [],
        "mean": {name: _list(cut.mean(values)) for name, values in columns.items()},
        "least": {},
        "greatest": {},
    }
    if not cut.whole:
        found["least"] = {name: _list(cut.least(values)) for name, values in columns.items()}
        found["greatest"] = {name: _list(cut.greatest(values)) for name, values in columns.items()}
    found["mean"]["idle"] = _list(_engines_idle(history, cut))
    return found


def _engines_idle(history: History, cut: Buckets) -> np.ndarray:
    """Share of the engines' time without a pack, ``[N]``; NaN where events are missing."""
    if not len(cut):
        return np.empty(0)
    ends_N = cut.last(history.time_S)
    known_N = np.isfinite(ends_N)
    idle_N = np.full(len(cut), np.nan)
    if known_N.sum() >= 2:
        edges = np.maximum.accumulate(ends_N[known_N])
        idle_N[np.flatnonzero(known_N)[1:]] = history.engine_idle(edges)
    return idle_N


def _evaluations(run: RunRecord) -> Document:
    metrics = run.metrics
    found = metrics.evaluations
    tokens_S = np.cumsum(metrics.tokens_S)
    where = np.searchsorted(metrics.step_S, list(found)).tolist()
    values = list(found.values())
    best = max(
        found, key=lambda step: (found[step].get("acceptance_length") or 0.0, -found[step]["loss"]), default=None
    )
    return {
        "step": list(found),
        "tokens": [int(tokens_S[i]) for i in where],
        "loss": [_short(each["loss"]) for each in values],
        "accuracy": [
            [_short(each["accuracy"][k] if k < len(each["accuracy"]) else None) for each in values]
            for k in range(len(metrics.terms))
        ],
        "acceptance_length": [_short(each.get("acceptance_length")) for each in values],
        "best": best,
    }


def _attempt(found: Spent, history: History) -> Document:
    attempt = found.attempt
    return {
        "number": attempt.number,
        "began": attempt.began,
        "job": attempt.job,
        "state": attempt.state,
        "why": attempt.why,
        "nodes": attempt.nodes,
        "steps": found.steps,
        "again": history.trained.get(attempt.number, 0) - found.steps,
        "parts": {name: round(seconds, 1) for name, seconds in found.parts.items()},
    }


def _plan(run: RunRecord, times: Sequence[Spent]) -> Document:
    """Planned figures next to measured ones."""
    metrics, found = run.metrics, planned(run)
    trained_s = sum(sum(each.parts[name] for name in ("training", "waiting", "evaluation")) for each in times)
    if not times:
        trained_s = float(np.nansum(metrics.scalars["seconds"]))
    tokens = int(metrics.tokens_S.sum())
    busy_s = float(np.nansum(metrics.scalars["seconds"]) - np.nansum(metrics.scalars["wait_s"]))
    measured = {"steps": len(metrics), "tokens": tokens, "seconds": round(trained_s, 1)}
    measured["trainer_tokens_per_s"] = _short(tokens / busy_s if busy_s > 0 else None)
    if isinstance(found, str):
        return {"measured": measured, "planned": None, "why": found}
    if (run.evaluation or {}).get("device") == "cpu":
        # Rates that are assumed for a GPU mean nothing on a CPU.
        return {
            "measured": measured,
            "planned": {"steps": found.steps, "tokens": found.tokens, "source": "known of GPUs only"},
        }
    return {"measured": measured, "planned": {name: _short(value, 6) for name, value in asdict(found).items()}}


def _differences(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Settings that are not the same in all runs: the name, and the value in each."""
    flat = [_flat(run.config) for run in runs]
    names = list(dict.fromkeys(name for each in flat for name in each))
    rows = [[name, *(each.get(name, "") for each in flat)] for name in names if name not in ("run.dir", "run.name")]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}
    return {name: str(value)}


def _list(values: np.ndarray, digits: int = DIGITS) -> list[float | None]:
    return [_short(value, digits) for value in values.tolist()]


def _short(value: Any, digits: int = DIGITS) -> Any:
    """A number with a few significant digits, None for NaN and infinity; other values unchanged."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short

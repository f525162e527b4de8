"""How fast engines and trainer ranks are: as given, as measured in an earlier run, or as assumed of a GPU.

A rate is kept in operations a second, so that it can be used for another corpus, of which another share is learnt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from specbatch.budget.work import Work, work_of
from specbatch.config import load_config
from specbatch.corpus import open_corpus
from specbatch.errors import UserError
from specbatch.rundir import RunDir

PEAK_TFLOPS = 989.0
"""Of an H100 in dense bfloat16, as its vendor states it."""
ENGINE_UTILISATION, TRAINER_UTILISATION = 0.5, 0.35
"""Shares of a GPU's peak that prefill and training are assumed to reach, where nothing was measured."""


@dataclass(frozen=True)
class Rate:
    """Of one engine, or of one trainer rank."""

    flops_per_s: float
    source: str
    """Where it comes from, in words."""


@dataclass(frozen=True)
class Rates:
    engine: Rate
    rank: Rate


@dataclass(frozen=True)
class Known:
    """What is known of speeds."""

    like: Path | None = None
    """A run whose rates are taken, where none is given."""
    engine_tokens_per_s: float | None = None
    """Of one engine, of the tokens that it computes."""
    trainer_tokens_per_s: float | None = None
    """Of all ranks together, of all tokens."""
    peak_tflops: float = PEAK_TFLOPS
    """Of a GPU, for what else is not known."""


def rates(known: Known, work: Work, tensor_parallel: int) -> Rates:
    """The best that is known: what is given, else what was measured, else what is assumed.

    Raises:
        UserError: if the run that was named tells nothing.
    """
    engine = _assumed(tensor_parallel, ENGINE_UTILISATION, known)
    rank = _assumed(1, TRAINER_UTILISATION, known)
    if known.engine_tokens_per_s:
        seconds = work.captured_tokens / known.engine_tokens_per_s
        engine = Rate(work.engine_flops / seconds, f"given: {known.engine_tokens_per_s:g} tokens/s")
    elif known.like is not None:
        engine = _measured_engine(known.like)
    if known.trainer_tokens_per_s:
        seconds = work.tokens / known.trainer_tokens_per_s
        source = f"given: {known.trainer_tokens_per_s:g} tokens/s"
        rank = Rate(work.trainer_flops / seconds / work.ranks, source)
    elif known.like is not None:
        rank = _measured_rank(known.like)
    return Rates(engine, rank)


def _assumed(gpus: int, utilisation: float, known: Known) -> Rate:
    of = f"{gpus} GPUs" if gpus > 1 else "a GPU"
    return Rate(
        gpus * known.peak_tflops * 1e12 * utilisation,
        f"assumed: {utilisation:.0%} of the {known.peak_tflops:g} TFLOP/s of {of}",
    )


def _measured_rank(root: Path) -> Rate:
    """What the ranks of a run did while they had data.

    The first step, which pays for what is set up once, does not count where there are others.
    """
    run_dir, work = _run(root)
    rows = {row["step"]: row for row in _rows(run_dir.metrics)}
    if not rows:
        raise UserError(f"--like: {root} has trained no step yet; name a run that has, or give the rates")
    steps = [step for step in rows if step > 1] or list(rows)
    busy_s = sum(rows[step]["seconds"] - rows[step]["wait_s"] for step in steps)
    trained = sum(work.trainer_flops_of(work.plan.packs(step)) for step in steps)
    return Rate(trained / max(busy_s, 1e-9) / work.ranks, f"measured in {root}, {len(steps)} steps")


def _measured_engine(root: Path) -> Rate:
    """What was stored, over the time in which an engine had any claim, by the events of all attempts.

    What an engine began before it had stored anything does not count: it pays for what is set up once.
    """
    run_dir, work = _run(root)
    flops, seconds, packs = 0.0, 0.0, 0
    for attempt in run_dir.attempts():
        spans: dict[str, list[tuple[float, float]]] = {}
        first: dict[str, float] = {}
        for event in _rows(run_dir.events(attempt)):
            if event["event"] != "stored" or "seconds" not in event:
                continue
            end = datetime.fromisoformat(event["time"]).timestamp()
            begun, ready = end - event["seconds"], first.setdefault(event["engine"], end)
            if begun < ready:
                continue
            spans.setdefault(event["engine"], []).append((begun, end))
            flops += work.engine_flops_of([work.plan.pack((event["pack"][0], event["pack"][1]))])
            packs += 1
        seconds += sum(covered(found) for found in spans.values())
    if not packs:
        raise UserError(f"--like: {root} does not say how long its packs took; give --engine-tokens-per-s")
    return Rate(flops / max(seconds, 1e-9), f"measured in {root}, {packs} packs")


@cache
def _run(root: Path) -> tuple[RunDir, Work]:
    run_dir = RunDir(root.absolute())
    if not run_dir.config.is_file():
        raise UserError(f"--like: {root} is no run directory: it has no config.yaml")
    return run_dir, work_of(load_config(run_dir.config), open_corpus(run_dir))


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, -np.inf
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return float(total)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines; the last one of a run that goes on may be half there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line.endswith("}")]

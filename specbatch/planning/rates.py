"""Speeds of engines and trainer ranks: given, measured in an earlier run, or assumed for a kind of GPU.

A rate is in operations per second, so that it is valid for another corpus with another share of loss tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from specbatch.config import Config, load_config
from specbatch.corpus import open_corpus
from specbatch.errors import UserError
from specbatch.gpu_kinds import Gpu, gpu
from specbatch.metrics_lines import read_metrics, whole_lines
from specbatch.planning.work import PlannedWork, work_of
from specbatch.rundir import RunDir
from specbatch.timestamps import seconds_of

ASSUMED_GPU = "h100"
"""Kind of GPU that is assumed if none is named."""
DENSE, BF16_EXPERTS, QUANTISED_EXPERTS, TRAINER = 0.40, 0.20, 0.15, 0.35
"""Shares of a GPU's peak, in the format in which weights are multiplied, that prefill and training are assumed to reach
where nothing was measured. Public measurements: prefill of Qwen3-8B, 27,000 tokens/s on an H200 (TorchSpec), 39 %; of
Kimi-K2.5 in INT4 with samples of 10,000 tokens, 17,800 tokens/s on eight H200 (TorchSpec, 4.0 M tokens an hour of each
of 16), 17 % of bfloat16; of DeepSeek-V3 in float8, 52,300 tokens/s on eight H100 with 2,000 tokens a prompt and experts
over 32 GPUs (LMSYS, May 2025), 25 %, which tensor parallelism alone does not reach."""


@dataclass(frozen=True)
class Rate:
    """Speed of one engine, or of one trainer rank."""

    flops_per_s: float
    source: str
    """Description of the rate's source."""


@dataclass(frozen=True)
class Rates:
    engine: Rate
    rank: Rate


@dataclass(frozen=True)
class Known:
    """Speeds that the user gave."""

    like: Path | None = None
    """A run, or the doctor's file of rates, whose rates are used if none are given."""
    engine_tokens_per_s: float | None = None
    """Tokens per second of one engine."""
    trainer_tokens_per_s: float | None = None
    """Tokens per second of all ranks together."""
    peak_tflops: float | None = None
    """Peak of a GPU, instead of its vendor's figure, for rates that are unknown."""


def rates(known: Known, work: PlannedWork, config: Config) -> Rates:
    """The best rates available: given ones, else measured ones, else assumed ones.

    Raises:
        UserError: the named run has no measurements.
    """
    engine = assumed_engine(
        config.inference.gpu or ASSUMED_GPU,
        config.inference.tensor_parallel,
        work.weight_format,
        experts=work.experts,
        peak_tflops=_profile_peak(known, config.inference.gpu, config),
    )
    rank = assumed_rank(
        config.training.gpu or ASSUMED_GPU, peak_tflops=_profile_peak(known, config.training.gpu, config)
    )
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


def _profile_peak(known: Known, kind: str, config: Config) -> float | None:
    """Return the given peak; if no kind of GPU is named, the peak in the cluster's profile."""
    return known.peak_tflops or (None if kind else config.slurm.gpu_tflops)


def assumed_engine(kind: str, gpus: int, form: str, *, experts: bool, peak_tflops: float | None = None) -> Rate:
    """The assumed rate of an engine.

    Args:
        kind: kind of its GPUs, a name in `specbatch.gpu_kinds.GPUS`.
        gpus: number of its GPUs.
        form: format of the target's weights, as `specbatch.planning.flops.ActiveWeights` names it.
        experts: whether the target is a mixture.
        peak_tflops: peak of a GPU, instead of its vendor's figure.
    """
    described, peak = _peak(gpu(kind, "inference.gpu"), form)
    if peak_tflops:
        described, peak = "peak", peak_tflops
    share = DENSE
    if experts:
        share = BF16_EXPERTS if described == "bfloat16" else QUANTISED_EXPERTS
    kinds = "mixtures" if experts else "dense targets"
    return Rate(
        gpus * peak * 1e12 * share,
        f"assumed: {share:.0%} of the {peak:g} TFLOP/s ({described}) of {_count(gpus, kind)}, as prefill of {kinds} "
        "reaches",
    )


def assumed_rank(kind: str, *, peak_tflops: float | None = None) -> Rate:
    """The assumed rate of a trainer rank; arguments as in `assumed_engine`."""
    peak = peak_tflops or gpu(kind, "training.gpu").bf16_tflops
    return Rate(peak * 1e12 * TRAINER, f"assumed: {TRAINER:.0%} of the {peak:g} TFLOP/s of {_count(1, kind)}")


def _peak(found: Gpu, form: str) -> tuple[str, float]:
    """Format in which a GPU multiplies weights of the given format, and its peak; other formats are widened to
    bfloat16."""
    if form == "nvfp4" and found.fp4_tflops:
        return "float4", found.fp4_tflops
    if found.fp8_tflops and (form == "fp8" or (form == "mxfp4" and found.fp4_tflops)):
        return "float8", found.fp8_tflops
    return "bfloat16", found.bf16_tflops


def _count(gpus: int, kind: str) -> str:
    return f"{gpus} {kind.upper()}" if gpus > 1 else f"an {kind.upper()}" if kind[0] in "ahl" else f"a {kind.upper()}"


def _of_file(path: Path, name: str) -> Rate:
    """Read a rate that the doctor measured.

    Raises:
        UserError: the file does not have this rate, or is not one of the doctor's.
    """
    try:
        found = json.loads(path.read_text())
        return Rate(float(found[name]), f"measured by the doctor, {path}")
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"--like: {path} has no {name}: it is not a file of rates of `specbatch doctor`, or lacks that check"
        ) from error


def _measured_rank(root: Path) -> Rate:
    """The rate of a run's ranks while they had data.

    The first step includes one-time costs and does not count if there are others.
    """
    if root.is_file():
        return _of_file(root, "rank_flops_per_s")
    run_dir, work = _run(root)
    rows = {row.step: row for row in read_metrics(run_dir.metrics)}
    if not rows:
        raise UserError(f"--like: {root} has trained no step yet; name a run that has, or give the rates")
    steps = [step for step in rows if step > 1] or list(rows)
    busy_s = sum(rows[step].seconds - rows[step].wait_s for step in steps)
    trained = sum(work.trainer_flops_of(work.plan.packs(step)) for step in steps)
    return Rate(trained / max(busy_s, 1e-9) / work.ranks, f"measured in {root}, {len(steps)} steps")


def _measured_engine(root: Path) -> Rate:
    """Return stored tokens over the time in which an engine had a claim, from the events of all attempts.

    Packs that an engine began before it had stored any do not count, because they include one-time costs.
    """
    if root.is_file():
        return _of_file(root, "engine_flops_per_s")
    run_dir, work = _run(root)
    flops, seconds, packs = 0.0, 0.0, 0
    for attempt in run_dir.attempts():
        spans: dict[str, list[tuple[float, float]]] = {}
        first: dict[str, float] = {}
        for event in map(json.loads, whole_lines(run_dir.events(attempt))):
            if event["event"] != "stored" or "seconds" not in event:
                continue
            end = seconds_of(event["time"])
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
def _run(root: Path) -> tuple[RunDir, PlannedWork]:
    run_dir = RunDir(root.absolute())
    if not run_dir.config.is_file():
        raise UserError(f"--like: {root} is not a run directory: it has no config.yaml")
    return run_dir, work_of(load_config(run_dir.config), open_corpus(run_dir))


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, -np.inf
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return float(total)

"""Measures how far two runs are apart, step by step and in their results, and whether that is more than noise.

Two runs of one configuration are equal bit for bit if the arithmetic is deterministic, whatever happened to them. If it
is not, even two undisturbed runs differ; their difference is the measure for others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specbatch.errors import UserError
from specbatch.metrics_lines import MetricsLine, read_metrics
from specbatch.rundir import RunDir
from specbatch.snapshot.manifest import differences, read_manifest, snapshot_path, whole_snapshots

if TYPE_CHECKING:
    import torch

NOISE_FACTOR = 2.0
"""A distance up to this multiple of that of two undisturbed runs is noise: theirs is one random sample."""
MEASURED = ("loss", "losses", "accuracy", "grad_norm", "learning_rate")
"""Fields of a step's line that rounding changes."""
COUNTED = ("tokens", "loss_tokens", "void_packs")
"""Fields of a step's line that nothing may change."""


@dataclass
class Distance:
    """How much one quantity differs between two runs."""

    name: str
    equal: bool
    """Whether they are equal to the last bit."""
    largest: float = 0.0
    """Largest absolute difference."""
    relative: float = 0.0
    """Root mean square of the differences, as a share of that of the values."""
    first: str = ""
    """Step or tensor where they first differ."""
    noise: float | None = None
    """The relative distance of two undisturbed runs."""

    @property
    def is_noise(self) -> bool:
        """Whether they are equal, or no further apart than two undisturbed runs may be."""
        return self.equal or (self.noise is not None and self.relative <= NOISE_FACTOR * self.noise)


@dataclass
class Comparison:
    """The comparison of two runs."""

    runs: tuple[str, str]
    steps: int = 0
    """Steps that both have."""
    snapshot: int | None = None
    """Step of the newest snapshot that both have."""
    problems: list[str] = field(default_factory=list)
    """Differences that can't be noise: steps that are missing or duplicate, counts and positions that differ."""
    distances: list[Distance] = field(default_factory=list)
    apart: list[dict[str, Any]] = field(default_factory=list)
    """Step, both losses and their difference, of each step whose loss differs."""

    @property
    def equal(self) -> bool:
        return not self.problems and all(distance.equal for distance in self.distances)

    @property
    def is_noise(self) -> bool:
        """Whether two undisturbed runs might differ like this; true of equal runs."""
        return not self.problems and all(distance.is_noise for distance in self.distances)

    @property
    def first_step(self) -> int | None:
        """The first step whose loss differs."""
        return self.apart[0]["step"] if self.apart else None


def compare(first: RunDir, second: RunDir, noise: tuple[RunDir, RunDir] | None = None) -> Comparison:
    """Compare metrics, the newest snapshot that both have, and the exports.

    Args:
        noise: two undisturbed runs of the same configuration, whose distance is the measure.

    Raises:
        UserError: a run has no metrics yet.
        DamagedSnapshot: a snapshot is damaged; names file and tensor.
    """
    found = Comparison((str(first.root), str(second.root)))
    _compare_steps(found, first, second)
    _compare_snapshots(found, first, second)
    _compare_exports(found, first, second)
    if noise is not None:
        measure = {distance.name: distance.relative for distance in compare(*noise).distances}
        for distance in found.distances:
            distance.noise = measure.get(distance.name)
    return found


class _Gauge:
    """Adds up the distance of one quantity."""

    def __init__(self, name: str) -> None:
        self.distance = Distance(name, equal=True)
        self._apart = self._size = 0.0

    def differ(self, where: str) -> None:
        if self.distance.equal:
            self.distance.equal, self.distance.first = False, where

    def add(self, largest: float, apart_squared: float, size_squared: float) -> None:
        self._apart += apart_squared
        self._size += size_squared
        self.distance.largest = max(self.distance.largest, largest)
        self.distance.relative = math.sqrt(self._apart / self._size) if self._size else math.sqrt(self._apart)


def _compare_steps(found: Comparison, first: RunDir, second: RunDir) -> None:
    lines, others = (_lines(run, found) for run in (first, second))
    common = sorted(set(lines) & set(others))
    found.steps = len(common)
    for run, own in ((first, lines), (second, others)):
        lacking = sorted((set(lines) | set(others)) - set(own))
        if lacking:
            found.problems.append(f"{run.root} lacks {len(lacking)} steps, the first of them {lacking[0]}")
    for name in COUNTED:
        counts = [(step, getattr(lines[step], name), getattr(others[step], name)) for step in common]
        found.problems += [f"{name} of step {step} is {a} and {b}" for step, a, b in counts if a != b][:1]
    for name in MEASURED:
        gauge = _Gauge(name)
        for step in common:
            mine, other = _numbers(getattr(lines[step], name)), _numbers(getattr(others[step], name))
            if mine != other:
                gauge.differ(f"step {step}")
            if len(mine) != len(other):
                found.problems.append(f"{name} of step {step} has {len(mine)} and {len(other)} values")
                continue
            apart = [abs(a - b) for a, b in zip(mine, other, strict=True)]
            gauge.add(max(apart, default=0.0), sum(x * x for x in apart), sum(a * a for a in mine))
        found.distances.append(gauge.distance)
    losses = [(step, _numbers(lines[step].loss)[0], _numbers(others[step].loss)[0]) for step in common]
    found.apart = [{"step": step, "loss": [a, b], "apart": abs(a - b)} for step, a, b in losses if a != b]


def _lines(run: RunDir, found: Comparison) -> dict[int, MetricsLine]:
    """Return the line of each step; a duplicate step, or one out of order, is a problem."""
    if not run.metrics.exists():
        raise UserError(f"{run.root}: has no metrics.jsonl: no step was trained yet")
    lines = read_metrics(run.metrics)
    steps = [line.step for line in lines]
    found.problems += [f"{run.metrics} has step {step} {n} times" for step, n in Counter(steps).items() if n > 1]
    if steps != sorted(steps):
        found.problems.append(f"{run.metrics} is not in the order of steps")
    return {line.step: line for line in lines}


def _numbers(value: Any) -> list[float]:
    """Return the numbers of a field, missing ones as -1."""
    values = value if isinstance(value, list) else [value]
    return [-1.0 if number is None else float(number) for number in values]


def _compare_snapshots(found: Comparison, first: RunDir, second: RunDir) -> None:
    there, others = whole_snapshots(first.snapshots), whole_snapshots(second.snapshots)
    common = set(there) & set(others)
    if not common:
        found.problems.append("the runs have no snapshot of the same step")
        return
    found.snapshot = step = max(common)
    if max(there) != max(others):
        found.problems.append(f"the newest snapshots are of steps {max(there)} and {max(others)}")
    path, other = snapshot_path(first.snapshots, step), snapshot_path(second.snapshots, step)
    mine, theirs = read_manifest(path), read_manifest(other)
    found.problems += [f"snapshot: {words}" for words in differences(mine.values, theirs.values)]
    names, wanted = list(mine.tensors), list(theirs.tensors)
    if mine.ranks != theirs.ranks:
        # Each rank has its own random generators.
        names, wanted = ([n for n in part if not n.startswith("random.")] for part in (names, wanted))
    unmatched = set(names) ^ set(wanted)
    if unmatched:
        found.problems.append(f"snapshot: only one of them has {', '.join(sorted(unmatched))}")
    from specbatch.snapshot.reading import each_tensor

    shared = [name for name in names if name in set(wanted)]
    pairs = zip(each_tensor(path, shared), each_tensor(other, shared), strict=True)
    _compare_tensors(found, ((name, tensor, theirs) for (name, tensor), (_, theirs) in pairs))


def _compare_exports(found: Comparison, first: RunDir, second: RunDir) -> None:
    files = [run.export / "model.safetensors" for run in (first, second)]
    there = [file.exists() for file in files]
    if not all(there):
        if any(there):
            found.problems.append(f"only {found.runs[there.index(True)]} has an export")
        return
    from safetensors import safe_open

    if (first.export / "config.json").read_bytes() != (second.export / "config.json").read_bytes():
        found.problems.append("the exports' config.json differ")
    with safe_open(files[0], "pt") as mine, safe_open(files[1], "pt") as theirs:
        names = set(mine.keys())
        if names != set(theirs.keys()):
            found.problems.append(f"export: only one has {', '.join(sorted(names ^ set(theirs.keys())))}")
        shared = sorted(names & set(theirs.keys()))
        _compare_tensors(found, ((n, mine.get_tensor(n), theirs.get_tensor(n)) for n in shared), "export")


def _compare_tensors(
    found: Comparison, pairs: Iterable[tuple[str, torch.Tensor, torch.Tensor]], kind: str = ""
) -> None:
    """Add a distance for each kind of tensor; one whole tensor is in memory at a time."""
    gauges: dict[str, _Gauge] = {}
    for name, tensor, other in pairs:
        gauge = gauges.setdefault(kind or _kind(name), _Gauge(kind or _kind(name)))
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            shapes = f"{tensor.dtype} {list(tensor.shape)} and {other.dtype} {list(other.shape)}"
            found.problems.append(f"{name} is {shapes}")
        elif not _same_bits(tensor, other):
            gauge.differ(name)
            apart = (tensor.double() - other.double()).abs()
            gauge.add(float(apart.max()), float(apart.square().sum()), float(tensor.double().square().sum()))
        else:
            gauge.add(0.0, 0.0, float(tensor.double().square().sum()))
    found.distances += [gauge.distance for gauge in gauges.values()]


def _same_bits(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other))
    return torch.equal(a, b)


def _kind(name: str) -> str:
    return {"optimizer": "optimizer", "random": "random generators"}.get(name.split(".")[0], "weights")


def report(found: Comparison, most: int = 20) -> Iterator[str]:
    """Yield the comparison in lines.

    Args:
        most: number of steps that are listed one by one.
    """
    snapshot = "" if found.snapshot is None else f", snapshots of step {found.snapshot}"
    yield f"{found.runs[0]} and {found.runs[1]}: {found.steps} steps{snapshot}"
    for distance in found.distances:
        if distance.equal:
            yield f"  {distance.name:18} equal"
            continue
        noise = "" if distance.noise is None else f"; two undisturbed runs {distance.noise:.2e}"
        yield (
            f"  {distance.name:18} {distance.relative:.2e} apart, {distance.largest:.2e} at most, from "
            f"{distance.first} on{noise}"
        )
    for step in found.apart[:most]:
        yield f"  step {step['step']}: loss {step['loss'][0]!r} and {step['loss'][1]!r}, {step['apart']:.2e} apart"
    if len(found.apart) > most:
        yield f"  and {len(found.apart) - most} more steps"
    yield from (f"  {problem}" for problem in found.problems)
    yield _verdict(found)


def _verdict(found: Comparison) -> str:
    if found.equal:
        return "equal, bit for bit"
    if found.problems:
        return "not equal, and not by noise"
    if found.is_noise:
        return "not equal, within the noise of two undisturbed runs"
    beyond = ", ".join(distance.name for distance in found.distances if not distance.is_noise)
    if any(distance.noise is not None for distance in found.distances):
        return f"not equal, and beyond the noise of two undisturbed runs: {beyond}"
    return f"not equal: {beyond}"

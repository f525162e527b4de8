"""The plan: which samples make up optimizer step s, as a pure function of configuration and corpus.

Every process computes the same plan, on every machine: it needs no random generator of a library, only integer
arithmetic.

- Each epoch is a separate shuffle of all samples, cut into packs of at most ``tokens_per_pack`` tokens.
- If sources have weights, an epoch is a sequence of as many such shuffles as the largest weight, so that no pack has a
  sample twice. Each shuffle takes from every source the share that it is due, cycling through the source in an order of
  its own: after any number of epochs, no sample was trained two times more than another of its source.
- The packs of all epochs form one sequence; step s takes the next ``packs_per_step`` of them, so a step may have packs
  of two epochs. Only the very last step can lack packs; it is filled with empty ones.
- Within a step, packs are dealt by falling cost, a round at a time, to the ranks that have the least so far; the first
  among equals changes with the step.
- Packs of held-out data are captured like those of training, before the first step that ranks train together, and
  never trained. They belong to the epoch `HELD_OUT`, and do not affect the others.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from specbatch.pack_manifest import PackId

HELD_OUT = -1
"""Epoch of the packs that are evaluated and never trained."""


@dataclass(frozen=True)
class Pack:
    """One or more samples that are captured, stored, fetched and trained together."""

    epoch: int
    index: int
    """Position in the epoch's order of packs, from 0."""
    samples: tuple[int, ...]
    """Indices into the corpus, where held-out samples follow those of training; empty for the packs that fill up the
    last step."""

    @property
    def id(self) -> PackId:
        return self.epoch, self.index


class PackPlan(Protocol):
    """The packs of each step: `Plan`, or `specbatch.recorded_plan.RecordedPlan`."""

    @property
    def epochs(self) -> int: ...

    @property
    def packs_per_step(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def heldout(self) -> tuple[Pack, ...]: ...

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def packs(self, step: int) -> list[Pack]: ...

    def step_of(self, pack: PackId) -> int: ...

    def assign(self, step: int, ranks: int) -> list[list[Pack]]: ...

    def assign_heldout(self, ranks: int) -> list[list[Pack]]: ...

    def tokens(self, pack: Pack) -> int: ...


class Plan:
    """Steps and their packs.

    Args:
        lengths: int ``[samples]``, tokens of each sample, each from 1 to ``tokens_per_pack``.
        seed: seed of the shuffles.
        epochs: passes over the corpus.
        tokens_per_pack: most tokens of a pack.
        packs_per_step: packs of an optimizer step.
        heldout: int ``[held-out samples]``, tokens of each, as ``lengths``.
        heldout_packs: most packs of held-out samples.
        weighted: for each source, in the order of the samples, its number of samples and how often each is trained per
            epoch. Default: every sample once.

    Raises:
        ValueError: the corpus is empty, a sample does not fit into a pack, or a number is below 1.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        seed: int,
        epochs: int,
        tokens_per_pack: int,
        packs_per_step: int,
        heldout: np.ndarray | None = None,
        heldout_packs: int = 0,
        weighted: list[tuple[int, float]] | None = None,
    ) -> None:
        self.lengths = np.ascontiguousarray(lengths, dtype=np.int64)
        self._heldout_lengths = np.ascontiguousarray(() if heldout is None else heldout, dtype=np.int64)
        self._all_lengths = np.concatenate([self.lengths, self._heldout_lengths])
        if not self.lengths.size:
            raise ValueError("the corpus has no samples")
        if min(epochs, tokens_per_pack, packs_per_step) < 1:
            raise ValueError("epochs, tokens_per_pack and packs_per_step must be at least 1")
        low, high = self._all_lengths.min(), self._all_lengths.max()
        if low < 1 or high > tokens_per_pack:
            raise ValueError(f"samples have {low} to {high} tokens, a pack holds 1 to {tokens_per_pack}")
        if weighted and sum(size for size, _ in weighted) != self.lengths.size:
            raise ValueError(f"sources of {sum(size for size, _ in weighted)} samples for {self.lengths.size}")
        self._weighted = weighted if weighted and any(weight != 1 for _, weight in weighted) else None
        self.seed, self.epochs = seed, epochs
        self.tokens_per_pack, self.packs_per_step = tokens_per_pack, packs_per_step
        self._epoch = lru_cache(maxsize=2)(self._pack_epoch)
        """Arrays of 16 bytes per sample, for as many epochs as a step can touch."""
        self._first = [0]
        for epoch in range(epochs):
            self._first.append(self._first[-1] + len(self._epoch(epoch)[1]) - 1)
        if not self._first[-1]:
            raise ValueError("the weights are so small that nothing is left to train")
        order, cuts = self._pack_epoch(HELD_OUT)
        self.heldout: tuple[Pack, ...] = tuple(
            Pack(HELD_OUT, index, tuple((order[begin:end] + len(self.lengths)).tolist()))
            for index, (begin, end) in enumerate(pairwise(cuts[: heldout_packs + 1].tolist()))
        )
        """The packs of held-out data, in the order in which they are captured."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole plan."""
        return -(-self._first[-1] // self.packs_per_step)

    def packs(self, step: int) -> list[Pack]:
        """Return the packs of a step, exactly ``packs_per_step``.

        Args:
            step: from 1 to ``steps``.
        """
        if not 1 <= step <= self.steps:
            raise IndexError(f"step {step} is not in 1..{self.steps}")
        first = (step - 1) * self.packs_per_step
        return [self._pack(position) for position in range(first, first + self.packs_per_step)]

    def pack(self, pack: PackId) -> Pack:
        """Return the pack with this id.

        Raises:
            IndexError: there is none.
        """
        if pack[0] == HELD_OUT:
            return self.heldout[pack[1]]
        return self._pack(self._first[pack[0]] + pack[1])

    def step_of(self, pack: PackId) -> int:
        """Return the step that trains a pack; 0 for held-out packs."""
        if pack[0] == HELD_OUT:
            return 0
        return (self._first[pack[0]] + pack[1]) // self.packs_per_step + 1

    def assign(self, step: int, ranks: int, costs: list[float] | None = None) -> list[list[Pack]]:
        """Deal the packs of a step to ranks: the same number each, with similar cost.

        Args:
            ranks: must divide ``packs_per_step``.
            costs: cost of each pack of ``packs(step)``. Default: its tokens.

        Raises:
            ValueError: ``ranks`` does not divide ``packs_per_step``.
        """
        if self.packs_per_step % ranks:
            raise ValueError(f"{ranks} ranks do not divide {self.packs_per_step} packs")
        packs = self.packs(step)
        costs = costs or [float(self.tokens(pack)) for pack in packs]
        order = sorted(range(len(packs)), key=lambda i: (-costs[i], i))
        dealt: list[list[Pack]] = [[] for _ in range(ranks)]
        spent = [0.0] * ranks
        for turn in range(0, len(packs), ranks):
            cheapest_first = sorted(range(ranks), key=lambda rank: (spent[rank], (rank + step) % ranks))
            for rank, i in zip(cheapest_first, order[turn : turn + ranks], strict=True):
                dealt[rank].append(packs[i])
                spent[rank] += costs[i]
        return dealt

    def assign_heldout(self, ranks: int) -> list[list[Pack]]:
        """Deal the held-out packs to ranks, in turn: some may have one less."""
        return [list(self.heldout[rank::ranks]) for rank in range(ranks)]

    def tokens(self, pack: Pack) -> int:
        """Return the tokens of a pack."""
        return int(self._all_lengths[list(pack.samples)].sum())

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """Everything that determines a plan: two plans train the same if and only if these are equal."""
        return {
            "seed": self.seed,
            "epochs": self.epochs,
            "tokens_per_pack": self.tokens_per_pack,
            "packs_per_step": self.packs_per_step,
            "samples": len(self.lengths),
            "lengths": hashlib.sha256(self.lengths.astype("<i8").tobytes()).hexdigest()[:16],
            **({"weights": repr(self._weighted)} if self._weighted else {}),
        }

    def times(self, steps: int) -> np.ndarray:
        """Return how often each sample is trained in the first ``steps``: int64
        ``[samples, then held-out samples]``."""
        found = np.zeros(self._all_lengths.size, dtype=np.int64)
        for epoch, first, last in self._stretches(steps):
            order, cuts = self._epoch(epoch)
            found += np.bincount(order[cuts[first] : cuts[last]], minlength=found.size)
        return found

    def step_sums(self, values: np.ndarray, steps: int) -> np.ndarray:
        """Return the sum of values over the samples of each of the first ``steps``: ``[steps]``.

        Args:
            values: the value of each sample, int64 ``[samples or more]``.
        """
        sums = np.zeros(steps, dtype=np.int64)
        for epoch, first, last in self._stretches(steps):
            order, cuts = self._epoch(epoch)
            running = np.concatenate([[0], np.cumsum(values[order[cuts[first] : cuts[last]]])])
            packs = np.diff(running[cuts[first : last + 1] - cuts[first]])
            position = self._first[epoch] + np.arange(first, last)
            np.add.at(sums, position // self.packs_per_step, packs)
        return sums

    def _stretches(self, steps: int) -> Iterator[tuple[int, int, int]]:
        """Yield the epochs of the first ``steps``, and the range of packs of each that belong to them, half open."""
        end = min(steps * self.packs_per_step, self._first[-1])
        for epoch, (first, behind) in enumerate(pairwise(self._first)):
            if first < end:
                yield epoch, 0, min(behind, end) - first

    def _pack(self, position: int) -> Pack:
        epoch = min(bisect_right(self._first, position) - 1, self.epochs - 1)
        index = position - self._first[epoch]
        order, cuts = self._epoch(epoch)
        if index >= len(cuts) - 1:
            return Pack(epoch, index, ())
        return Pack(epoch, index, tuple(order[cuts[index] : cuts[index + 1]].tolist()))

    def _pack_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of an epoch in order, and the boundaries of its packs, by next fit."""
        lengths = self._heldout_lengths if epoch == HELD_OUT else self.lengths
        if self._weighted and epoch != HELD_OUT:
            return self._pack_weighted(epoch, self._weighted)
        # No two hashes are equal, so the order does not depend on the sorting algorithm.
        order = np.argsort(_hashes(len(lengths), self.seed, epoch))
        return order, _next_fit(lengths[order], self.tokens_per_pack)

    def _pack_weighted(self, epoch: int, weighted: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Do the same as `_pack_epoch` for sources with weights."""
        rounds = max(1, math.ceil(max(weight for _, weight in weighted)))
        orders, cuts, first = [], [np.zeros(1, dtype=np.int64)], 0
        for turn in range(rounds):
            samples, begin = [], 0
            for source, (size, weight) in enumerate(weighted):
                # Integer arithmetic, so that every machine gets the same result.
                share = Fraction(weight).limit_denominator(1 << 20) * size / rounds
                low, high = (math.floor(share * (epoch * rounds + turn + more)) for more in (0, 1))
                own = np.argsort(_hashes(size, self.seed, f"source {source}"))
                samples.append(begin + own[np.arange(low, high) % max(1, size)])
                begin += size
            chosen = np.concatenate(samples)
            order = chosen[np.argsort(_hashes(len(chosen), self.seed, f"{epoch} round {turn}"))]
            orders.append(order)
            cuts.append(first + _next_fit(self.lengths[order], self.tokens_per_pack)[1:])
            first += len(order)
        return np.concatenate(orders), np.concatenate(cuts)


def _next_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """Return the boundaries of packs of samples in a given order, int64: a pack ends when the next sample does not
    fit."""
    ends = np.cumsum(lengths)
    # For each sample, the end of a pack that would begin there.
    following = memoryview(np.searchsorted(ends, ends - lengths + room, side="right"))
    cuts = [0]
    while cuts[-1] < len(ends):
        cuts.append(following[cuts[-1]])
    return np.array(cuts, dtype=np.int64)


def _hashes(count: int, seed: int, epoch: int | str) -> np.ndarray:
    """Return the SplitMix64 hashes (Steele, Lea, Flood 2014) of the numbers from 0, keyed by seed and by epoch or
    another name of the shuffle: uint64 ``[count]``."""
    key = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    gamma = np.uint64(0x9E3779B97F4A7C15)
    x = np.arange(1, count + 1, dtype=np.uint64) * gamma + np.uint64(int.from_bytes(key[:8], "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))

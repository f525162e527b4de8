"""The plan: which samples make up optimizer step s, as a pure function of configuration and corpus.

Every process computes it for itself and gets the same, on every machine: there is no random generator
of a library in it, only integer arithmetic.

- Each epoch is a shuffle of its own of all samples, cut into packs of at most ``tokens_per_pack`` tokens.
- The packs of all epochs stand in one row; step s takes the next ``packs_per_step`` of them, so a step may
  hold packs of two epochs. Only the very last step can lack packs: it is filled with empty ones.
- Within a step, packs are dealt by falling cost, a round at a time, to the ranks that have the least so far;
  who is first among equals changes with the step.
- Packs of held-out data are captured as those of training are, before the first step that ranks train together, and
  never trained. They are of the epoch `HELD_OUT`, and change nothing about the others.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from specbatch.manifest import PackId

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


class Plan:
    """Steps and their packs.

    Args:
        lengths: int ``[samples]``, tokens of each sample, each from 1 to ``tokens_per_pack``.
        seed: of the shuffles.
        epochs: passes over the corpus.
        tokens_per_pack: most tokens of a pack.
        packs_per_step: packs of an optimizer step.
        heldout: int ``[held-out samples]``, tokens of each, as ``lengths``.
        heldout_packs: most packs that are made of them.

    Raises:
        ValueError: for an empty corpus, a sample that no pack can hold, or numbers below 1.
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
        self.seed, self.epochs = seed, epochs
        self.tokens_per_pack, self.packs_per_step = tokens_per_pack, packs_per_step
        self._epoch = lru_cache(maxsize=2)(self._pack_epoch)
        self._first = [0]
        for epoch in range(epochs):
            self._first.append(self._first[-1] + len(self._epoch(epoch)[1]) - 1)
        order, cuts = self._pack_epoch(HELD_OUT)
        self.heldout: tuple[Pack, ...] = tuple(
            Pack(HELD_OUT, index, tuple((order[begin:end] + len(self.lengths)).tolist()))
            for index, (begin, end) in enumerate(pairwise(cuts[: heldout_packs + 1]))
        )
        """The packs of held-out data, in the order in which they are captured."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole plan."""
        return -(-self._first[-1] // self.packs_per_step)

    def packs(self, step: int) -> list[Pack]:
        """The packs of a step, exactly ``packs_per_step``.

        Args:
            step: from 1 to ``steps``.
        """
        if not 1 <= step <= self.steps:
            raise IndexError(f"step {step} is not in 1..{self.steps}")
        first = (step - 1) * self.packs_per_step
        return [self._pack(position) for position in range(first, first + self.packs_per_step)]

    def pack(self, pack: PackId) -> Pack:
        """The pack with this id.

        Raises:
            IndexError: if there is none.
        """
        if pack[0] == HELD_OUT:
            return self.heldout[pack[1]]
        return self._pack(self._first[pack[0]] + pack[1])

    def step_of(self, pack: PackId) -> int:
        """The step that trains a pack; 0 for held-out ones."""
        if pack[0] == HELD_OUT:
            return 0
        return (self._first[pack[0]] + pack[1]) // self.packs_per_step + 1

    def assign(self, step: int, ranks: int, costs: list[float] | None = None) -> list[list[Pack]]:
        """Deal the packs of a step to ranks: the same number each, of even cost.

        Args:
            ranks: must divide ``packs_per_step``.
            costs: what each pack of ``packs(step)`` costs; tokens where not given.

        Raises:
            ValueError: if ``ranks`` does not divide ``packs_per_step``.
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
        """Tokens of a pack."""
        return int(self._all_lengths[list(pack.samples)].sum())

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """What makes a plan this plan; two plans train the same exactly if these are equal."""
        return {
            "seed": self.seed,
            "epochs": self.epochs,
            "tokens_per_pack": self.tokens_per_pack,
            "packs_per_step": self.packs_per_step,
            "samples": len(self.lengths),
            "lengths": hashlib.sha256(self.lengths.astype("<i8").tobytes()).hexdigest()[:16],
        }

    def _pack(self, position: int) -> Pack:
        epoch = min(bisect_right(self._first, position) - 1, self.epochs - 1)
        index = position - self._first[epoch]
        order, cuts = self._epoch(epoch)
        if index >= len(cuts) - 1:
            return Pack(epoch, index, ())
        return Pack(epoch, index, tuple(order[cuts[index] : cuts[index + 1]].tolist()))

    def _pack_epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The samples of an epoch in order, and where its packs begin and end: next fit."""
        lengths = self._heldout_lengths if epoch == HELD_OUT else self.lengths
        order = np.argsort(_hashes(len(lengths), self.seed, epoch), kind="stable")
        ends = np.cumsum(lengths[order]).tolist()
        cuts, taken = [0], 0
        while cuts[-1] < len(ends):
            cuts.append(bisect_right(ends, taken + self.tokens_per_pack, lo=cuts[-1]))
            taken = ends[cuts[-1] - 1]
        return order, cuts


def _hashes(count: int, seed: int, epoch: int) -> np.ndarray:
    """uint64 ``[count]``: SplitMix64 (Steele, Lea, Flood 2014) of the numbers from 0, keyed by seed and epoch."""
    key = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    gamma = np.uint64(0x9E3779B97F4A7C15)
    x = np.arange(1, count + 1, dtype=np.uint64) * gamma + np.uint64(int.from_bytes(key[:8], "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))

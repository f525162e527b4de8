"""Loss masks and costs of many samples, as arrays over samples, so that a corpus of millions takes seconds.

Shapes: ``S`` samples, ``N`` tokens of many samples one after the other, ``R`` runs of loss tokens of many samples one
after the other, ``T`` terms of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from specbatch.drafts.base import BYTES_PER_VALUE, CaptureContract


class SampleId(NamedTuple):
    """A sample in one epoch of the plan. Everything that is drawn at random for a sample depends only on this and the
    run's seed."""

    epoch: int
    sample: int
    """Index of the sample in the corpus."""


_VERY_FIRST = SampleId(0, 0)


@dataclass(frozen=True)
class Runs:
    """Runs of consecutive loss tokens: the content of a mask, in a few numbers per sample."""

    first_R: np.ndarray
    """int64: the first token of each run, within its sample."""
    end_R: np.ndarray
    """int64: one past the last token of each run; less than the first token of the sample's next run."""
    ends_S: np.ndarray
    """int64: one past the index of each sample's last run."""

    @cached_property
    def begins_S(self) -> np.ndarray:
        """int64: index of each sample's first run."""
        return np.concatenate([[0], self.ends_S]).astype(np.int64)[:-1]

    def total(self, values_R: np.ndarray) -> np.ndarray:
        """Return the sums of ``[..., R]`` over the runs of each sample, int64 ``[..., S]``."""
        sums_S = np.zeros((*values_R.shape[:-1], len(self.ends_S)), dtype=np.int64)
        if values_R.shape[-1]:
            np.cumsum(values_R, axis=-1, dtype=np.int64).take(self.ends_S - 1, axis=-1, out=sums_S, mode="clip")
            sums_S[..., self.ends_S == 0] = 0
        return np.diff(sums_S, axis=-1, prepend=0)


@dataclass(frozen=True)
class Masks:
    """The loss masks of consecutive samples, as masks and as runs. The form that is not given is computed on demand."""

    given: np.ndarray | Runs
    """The tokens that are learnt, bool ``[N]``, or their runs."""
    lengths_S: np.ndarray
    """int64: tokens of each sample, at least 1."""
    samples: Sequence[SampleId] = ()
    """Ids of the samples; empty if they are consecutive in the corpus."""
    first: SampleId = _VERY_FIRST
    """Id of the first sample, used if `samples` is empty."""

    @classmethod
    def of(cls, masks: Sequence[np.ndarray], samples: Sequence[SampleId] = ()) -> Masks:
        """Make them from the masks of single samples, bool ``[tokens]`` each."""
        none = np.empty(0, dtype=bool)
        return cls(np.concatenate([none, *masks]).astype(bool), np.array([len(m) for m in masks], np.int64), samples)

    def sample(self, index: int) -> SampleId:
        """Return the id of the sample at ``index``."""
        return self.samples[index] if len(self.samples) else SampleId(self.first.epoch, self.first.sample + index)

    @cached_property
    def mask_N(self) -> np.ndarray:
        """bool: the tokens that are learnt."""
        if not isinstance(self.given, Runs):
            return self.given
        runs = self.given
        start_R = np.repeat(self.starts_S, runs.ends_S - runs.begins_S)
        edges = np.stack([start_R + runs.first_R, start_R + runs.end_R], axis=-1).ravel()
        stretches = np.diff(edges, prepend=0, append=self.lengths_S.sum())
        return np.repeat(np.arange(len(stretches)) % 2 == 1, stretches)

    @cached_property
    def runs(self) -> Runs:
        """The runs of loss tokens."""
        if isinstance(self.given, Runs):
            return self.given
        mask_N, no = self.given, [False]
        begins = np.zeros(len(mask_N) + 1, dtype=bool)
        begins[self.starts_S] = begins[-1] = True
        first_R = np.flatnonzero(mask_N & (begins[:-1] | ~np.concatenate([no, mask_N[:-1]])[: len(mask_N)]))
        last_R = np.flatnonzero(mask_N & (begins[1:] | ~np.concatenate([mask_N[1:], no])[: len(mask_N)]))
        runs_S = np.searchsorted(first_R, self.starts_S + self.lengths_S)
        start_R = np.repeat(self.starts_S, np.diff(runs_S, prepend=0))
        return Runs(first_R - start_R, last_R + 1 - start_R, runs_S)

    @cached_property
    def loss_tokens_S(self) -> np.ndarray:
        """int64: loss tokens of each sample."""
        return self.runs.total(self.runs.end_R - self.runs.first_R)

    @cached_property
    def starts_S(self) -> np.ndarray:
        """int64: where each sample begins."""
        return np.cumsum(self.lengths_S) - self.lengths_S

    @cached_property
    def position_N(self) -> np.ndarray:
        """int64: position of each token in its sample."""
        return np.arange(len(self.mask_N)) - np.repeat(self.starts_S, self.lengths_S)

    @cached_property
    def left_N(self) -> np.ndarray:
        """int64: number of tokens of the sample that follow each token."""
        return np.repeat(self.lengths_S, self.lengths_S) - 1 - self.position_N

    def ahead(self, values_N: np.ndarray, by: int) -> np.ndarray:
        """Return the values ``by`` tokens later in the same sample, False beyond its end: bool ``[N]``."""
        shifted = np.concatenate([values_N[by:], np.zeros(min(by, len(values_N)), dtype=bool)])
        return shifted & (self.left_N >= by)

    def total(self, values_N: np.ndarray) -> np.ndarray:
        """Return the sums of ``[..., N]`` over each sample, int64 ``[..., S]``."""
        if not len(self.lengths_S):
            return np.zeros((*values_N.shape[:-1], 0), dtype=np.int64)
        return np.add.reduceat(values_N.astype(np.int64), self.starts_S, axis=-1)


@dataclass(frozen=True)
class Costs:
    """The costs of samples. All arrays have one entry per sample."""

    captured_S: np.ndarray
    """int64: tokens that an engine computes, up to the last one whose states are read."""
    rows_S: Mapping[str, np.ndarray]
    """int64: rows of each tensor of the contract."""
    counts_TS: np.ndarray
    """int64: positions that enter each term of the loss."""
    computed_TS: np.ndarray
    """int64: positions that are computed in full for each term."""
    flops_S: np.ndarray
    """float64: operations of forward and backward."""
    forward_flops_S: np.ndarray
    """float64: operations of an evaluation."""

    def bytes_S(self, contract: CaptureContract) -> np.ndarray:
        """Return the bytes that each sample occupies in the store, int64."""
        values_S = [contract.widths[name] * rows_S for name, rows_S in self.rows_S.items()]
        return BYTES_PER_VALUE * np.stack(values_S).sum(axis=0)

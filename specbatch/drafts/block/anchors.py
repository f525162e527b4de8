"""The positions of a sample's blocks: a pure function of its mask, the run's seed and the epoch.

It has no random generator with a state, so every rank knows how many slots of a step learn, for any number of ranks,
and a resumed run draws the same anchors.

Shapes: as in `specbatch.drafts.masks`; ``K`` tokens that a block proposes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from specbatch.drafts.block.contract import is_candidate
from specbatch.drafts.masks import Masks
from specbatch.plan import HELD_OUT

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Draw:
    """How anchors are drawn."""

    seed: int
    """The run's."""
    most: int | None
    """Most blocks of a sample; None for one at every candidate. Held-out samples always have all of them."""


def anchors(masks: Masks, draw: Draw) -> np.ndarray:
    """Return the positions at which blocks stand, bool ``[N]``."""
    candidate_N = is_candidate(masks)
    if draw.most is None:
        return candidate_N
    samples = [masks.sample(index) for index in range(len(masks.lengths_S))]
    keys_S = np.array([_key(draw.seed, *sample) for sample in samples], dtype=np.uint64)
    hash_N = _mix(np.repeat(keys_S, masks.lengths_S) + (masks.position_N.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    where = np.flatnonzero(candidate_N)
    sample_of = np.repeat(np.arange(len(samples)), masks.lengths_S)[where]
    order = np.lexsort((where, hash_N[where], sample_of))
    sorted_sample = sample_of[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_sample, sorted_sample)
    whole_S = np.array([sample.epoch == HELD_OUT for sample in samples], dtype=bool)
    kept = where[order[(rank < draw.most) | whole_S[sorted_sample]]]
    chosen_N = np.zeros_like(candidate_N)
    chosen_N[kept] = True
    return chosen_N


def learning(masks: Masks, anchor_N: np.ndarray, proposals: int) -> np.ndarray:
    """Return at which anchors the first, second, ... proposed token of a block is learnt: those from which loss tokens
    continue to it without a break. bool ``[K, N]``."""
    found = np.empty((proposals, len(anchor_N)), dtype=bool)
    good_N = anchor_N
    for k in range(proposals):
        good_N = good_N & masks.ahead(masks.mask_N, 1 + k)
        found[k] = good_N
    return found


def _key(seed: int, epoch: int, index: int) -> int:
    digest = hashlib.blake2b(f"anchors {seed} {epoch} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer (Steele, Lea, Flood 2014) to uint64 values."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))

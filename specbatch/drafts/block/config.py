"""The fields of the ``draft`` section of DFlash and of DSpark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from specbatch.config.rules import above, at_least
from specbatch.config.types import Count, Natural
from specbatch.drafts.size import SizedDraft


@dataclass
class BlockDraft(SizedDraft):
    """A draft that proposes a whole block of tokens in one pass."""

    num_layers: Count = 5
    """Decoder layers of the draft."""
    block_size: Annotated[int, at_least(2)] = 8
    """Slots of a block. Train the block size that will be served: serving a shorter block is worse than training at
    that size."""
    mask_token_id: Natural | None = None
    """Id of the token whose embedding marks slots to be filled. It must not occur in any text and must not be an end
    token. Required."""
    anchors: Count | None = None
    """Most blocks of a sample, drawn anew in each epoch. If not given, there is a block at every position at which
    decoding could draft."""
    position_decay: Annotated[float, above(0)] = 4.0
    """Decay of the loss weight: the slot that proposes the k-th token, from 0, has the weight exp(-k / position_decay).
    4 is good for blocks of 7 or 8, and 7 for blocks of 16."""


@dataclass
class DFlashDraft(BlockDraft):
    """The draft model: DFlash, decoder layers over the target's states that fill a block of masks in one pass."""

    algorithm: str = "dflash"
    loss: Literal["kl", "ce"] = "kl"
    """Loss of a slot: learn the target's distribution (kl), or the token of the text (ce)."""
    d_pace: bool = False
    """Weight a slot by the probability that the draft reaches it (D-PACE, arXiv:2605.18810), instead of
    `position_decay`. This costs a second product with the target's head for each slot."""


@dataclass
class DSparkDraft(BlockDraft):
    """The draft model: DSpark, DFlash's layers whose slots propose the token after their own, with a term for pairs of
    neighbouring tokens and an estimate of how likely a proposal is accepted."""

    algorithm: str = "dspark"
    block_size: Annotated[int, at_least(2)] = 7
    """Slots of a block, each of which proposes a token."""
    markov_rank: Natural = 256
    """Rank of the term for pairs of tokens, which has two matrices of vocabulary by rank. 0: no such
    term."""
    confidence: bool = True
    """Train the estimate of acceptance, which lets an engine end a block early."""

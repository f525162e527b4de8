"""The fields of EAGLE-3's ``draft`` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from specbatch.config.rules import above, at_most
from specbatch.config.types import Count
from specbatch.drafts.size import SizedDraft


@dataclass
class Eagle3Draft(SizedDraft):
    """The draft model: EAGLE-3 (arXiv:2503.01840), one decoder layer, unrolled over its own predictions."""

    algorithm: str = "eagle3"
    ttt_steps: Count = 7
    """Unrolled steps of training-time test: the number of tokens that the draft learns to propose at a time."""
    step_decay: Annotated[float, above(0), at_most(1)] = 0.8
    """Ratio of each unrolled step's loss weight to that of the previous step."""
    loss: Literal["kl", "lk_lambda", "lk_alpha"] = "kl"
    """Loss. kl: learn the target's whole distribution. For serving at temperatures above 0, maximise the probability
    that a sampled proposal is accepted (arXiv:2602.23881): its logarithm (lk_alpha), or the probability itself,
    starting with kl (lk_lambda)."""
    vocab_size: Count | None = 32000
    """Tokens of the draft's vocabulary: the most frequent loss tokens of the corpus. `null`: the target's whole
    vocabulary."""
    fc_norm: bool = False
    """Normalise the output of each of the target's layers separately before the projection (EAGLE-3.1)."""
    norm_output: bool = False
    """Unroll over the normalised state, which the head reads, instead of the sum of residuals (EAGLE-3.1). Both are off
    by default: on the quickstart's data, with three tokens drafted at a time, a third of its steps and the same seed,
    the acceptance length along stored states is 1.60 with both and 1.61 without."""
    train_head: bool = True
    """Train the head, which starts as the target's. false: keep it fixed, which saves 12 bytes per weight, over all
    ranks."""
    train_embedding: bool = False
    """Train a separate embedding, which starts as the target's. It costs 16 bytes per weight, over all ranks, and
    whoever serves the draft has to load another matrix of the size of the target's embedding."""

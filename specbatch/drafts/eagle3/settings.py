"""The settings of an EAGLE-3 draft's module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specbatch.config import Config
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.drafts.eagle3.memory import Shape, default_columns_at_once
from specbatch.drafts.eagle3.model import Eagle3Settings
from specbatch.drafts.rope import Rope
from specbatch.drafts.vocabulary import draft_ids

if TYPE_CHECKING:
    from specbatch.corpus import Corpus
    from specbatch.target import TargetShape


def settings(config: Config, draft: Eagle3Draft, target: TargetShape, shape: Shape, corpus: Corpus) -> Eagle3Settings:
    """Return the draft's shape, and how it is computed here."""
    gpu = torch.accelerator.is_available()
    return Eagle3Settings(
        shape=shape,
        rms_norm_eps=target.rms_norm_eps,
        rope=Rope.of(target, shape.head_dim),
        ttt_steps=draft.ttt_steps,
        draft_ids=draft_ids(draft.vocab_size, target.vocab, corpus),
        loss=draft.loss,
        target_logits=target.logits,
        columns_at_once=config.training.columns_at_once or default_columns_at_once(gpu=gpu),
        recompute=config.training.recompute,
    )

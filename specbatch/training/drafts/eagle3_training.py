"""EAGLE-3 for its training (`specbatch.training.drafts.Training`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specbatch.config import Config
from specbatch.corpus import draft_vocabulary
from specbatch.target import TargetShape, capture_contract
from specbatch.training.drafts.eagle3 import Eagle3 as Draft
from specbatch.training.drafts.eagle3 import Eagle3Config, Recompute
from specbatch.training.drafts.pack import part_of, supervised_counts
from specbatch.training.drafts.rope import Rope
from specbatch.training.memory import default_columns_at_once

if TYPE_CHECKING:
    from specbatch.corpus import Corpus

__all__ = ["Draft", "part_of", "settings", "supervised_counts"]


def settings(config: Config, target: TargetShape, corpus: Corpus) -> Eagle3Config:
    """The draft's shape: the target's, but for depth, vocabulary and, if wished, the MLP's width."""
    scaling = target.rope["rope_scaling"] or {}
    gpu = torch.accelerator.is_available()
    return Eagle3Config(
        hidden_size=target.hidden,
        intermediate_size=config.draft.intermediate_size or target.intermediate,
        num_attention_heads=target.heads,
        num_key_value_heads=target.kv_heads,
        head_dim=target.head_dim,
        rms_norm_eps=target.rms_norm_eps,
        rope=Rope(target.head_dim, target.rope["rope_theta"], target.max_positions, tuple(scaling.items())),
        ttt_steps=config.draft.ttt_steps,
        draft_ids=_draft_ids(config, target, corpus),
        contract=capture_contract(config, target),
        train_head=config.draft.train_head,
        embedding_rows=target.vocab if config.draft.train_embedding else 0,
        columns_at_once=config.training.columns_at_once or default_columns_at_once(gpu=gpu),
        recompute=Recompute(config.training.recompute),
    )


def _draft_ids(config: Config, target: TargetShape, corpus: Corpus) -> tuple[int, ...]:
    """Target ids of the draft's vocabulary, ascending."""
    size = config.draft.vocab_size
    if size is None or size >= target.vocab:
        return tuple(range(target.vocab))
    size = min(size, corpus.tokenizer_size)
    return tuple(draft_vocabulary(corpus.loss_token_counts, size, corpus.tokenizer_size).tolist())

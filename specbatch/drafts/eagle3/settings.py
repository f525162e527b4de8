"""The settings of an EAGLE-3 draft's module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specbatch.config import Config
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.drafts.eagle3.contract import Eagle3Contract
from specbatch.drafts.eagle3.memory import Shape, default_columns_at_once
from specbatch.drafts.eagle3.model import Eagle3Settings
from specbatch.drafts.rope import Rope
from specbatch.drafts.vocabulary import draft_ids

if TYPE_CHECKING:
    from specbatch.corpus import Corpus
    from specbatch.target import TargetShape


def settings(
    config: Config, draft: Eagle3Draft, target: TargetShape, shape: Shape, contract: Eagle3Contract, corpus: Corpus
) -> Eagle3Settings:
    """Return the draft's shape, and how it is computed here."""
    gpu = torch.accelerator.is_available()
    return Eagle3Settings(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=target.rms_norm_eps,
        rope=Rope.of(target, shape.head_dim),
        ttt_steps=draft.ttt_steps,
        draft_ids=draft_ids(draft.vocab_size, target.vocab, corpus),
        aux_width=contract.widths["aux"],
        loss=draft.loss,
        fc_norm=draft.fc_norm,
        norm_output=draft.norm_output,
        train_head=draft.train_head,
        target_logits=target.logits,
        embedding_rows=target.vocab if draft.train_embedding else 0,
        columns_at_once=config.training.columns_at_once or default_columns_at_once(gpu=gpu),
        recompute=config.training.recompute,
    )

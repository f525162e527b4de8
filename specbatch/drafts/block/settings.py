"""The settings of a block draft's module."""

from __future__ import annotations

import torch

from specbatch.config import Config
from specbatch.drafts.block.anchors import Draw
from specbatch.drafts.block.config import BlockDraft
from specbatch.drafts.block.contract import BlockContract
from specbatch.drafts.block.memory import BlockShape, default_slots_at_once
from specbatch.drafts.block.model import BlockSettings
from specbatch.drafts.block.objective import Objective
from specbatch.drafts.rope import Rope
from specbatch.target import TargetShape


def settings(
    config: Config,
    draft: BlockDraft,
    target: TargetShape,
    shape: BlockShape,
    contract: BlockContract,
    draw: Draw,
    objective: Objective,
) -> BlockSettings:
    """Return the draft's shape, and how it is computed here."""
    assert draft.mask_token_id is not None
    gpu = torch.accelerator.is_available()
    return BlockSettings(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=target.rms_norm_eps,
        rope=Rope.of(target, shape.head_dim),
        aux_width=contract.widths["aux"],
        block_size=shape.block_size,
        first_slot=shape.first_slot,
        mask_token_id=draft.mask_token_id,
        draw=draw,
        objective=objective,
        draft_ids=range(target.vocab),
        markov_rank=shape.markov_rank,
        confidence=shape.confidence,
        target_logits=target.logits,
        slots_at_once=config.training.columns_at_once or default_slots_at_once(gpu=gpu),
        recompute=config.training.recompute,
    )

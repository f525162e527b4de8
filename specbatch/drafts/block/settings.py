"""The settings of a block draft's module."""

from __future__ import annotations

import torch

from specbatch.config import Config
from specbatch.drafts.block.anchors import Draw
from specbatch.drafts.block.config import BlockDraft
from specbatch.drafts.block.memory import BlockShape, default_slots_at_once
from specbatch.drafts.block.model import BlockSettings
from specbatch.drafts.block.objective import Objective
from specbatch.drafts.rope import Rope
from specbatch.target import TargetShape


def settings(
    config: Config, draft: BlockDraft, target: TargetShape, shape: BlockShape, draw: Draw, objective: Objective
) -> BlockSettings:
    """Return the draft's shape, and how it is computed here."""
    assert draft.mask_token_id is not None
    gpu = torch.accelerator.is_available()
    return BlockSettings(
        shape=shape,
        rms_norm_eps=target.rms_norm_eps,
        rope=Rope.of(target, shape.head_dim),
        mask_token_id=draft.mask_token_id,
        draw=draw,
        objective=objective,
        target_logits=target.logits,
        slots_at_once=config.training.columns_at_once or default_slots_at_once(gpu=gpu),
        recompute=config.training.recompute,
    )

"""Small drafts and packs for the tests of block drafts."""

from __future__ import annotations

import numpy as np
import torch

from specbatch.drafts.block.anchors import Draw, anchors
from specbatch.drafts.block.contract import BlockContract
from specbatch.drafts.block.memory import BlockShape
from specbatch.drafts.block.model import BlockModule, BlockSettings
from specbatch.drafts.block.objective import Objective
from specbatch.drafts.masks import Masks
from specbatch.drafts.pack import PackTensors
from specbatch.drafts.rope import Rope
from specbatch.target.logits import PLAIN, Logits
from tests.drafts import samples
from tests.drafts.block.oracle import Oracle, block_losses
from tests.drafts.samples import EPS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, THETA, VOCAB, gradients_of, packed

MASK_TOKEN = VOCAB - 1
CONTRACT = BlockContract(aux_layers=(0, 1, 2), hidden=HIDDEN)
EVERY = Draw(7, None)


class Sample(samples.Sample):
    tokens = MASK_TOKEN

    def anchors(self, draw: Draw) -> list[int]:
        return np.flatnonzero(anchors(Masks.of([np.array(self.mask)], (self.id,)), draw)).tolist()


def make_draft(
    *,
    block: int = 4,
    layers: int = 2,
    first_slot: int = 1,
    draw: Draw = EVERY,
    markov_rank: int = 0,
    confidence: bool = False,
    objective: Objective | None = None,
    changed_logits: bool = False,
) -> BlockModule:
    settings = BlockSettings(
        shape=BlockShape(
            HIDDEN, 12, HEADS, KV_HEADS, HEAD_DIM, VOCAB, 3, layers, block, first_slot, markov_rank, confidence
        ),
        rms_norm_eps=EPS,
        rope=Rope(HEAD_DIM, THETA, 64),
        mask_token_id=MASK_TOKEN,
        draw=draw,
        objective=objective or Objective(distribution=1.0),
        target_logits=Logits(0.5, 2.0) if changed_logits else PLAIN,
    )
    draft = BlockModule(settings).double()
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(2, VOCAB, HIDDEN, dtype=torch.float64, generator=generator)
    bias = torch.randn(VOCAB, dtype=torch.float64, generator=generator) if changed_logits else None
    draft.initialize(3, table[0], table[1], target_bias=bias)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(2).add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return draft


def pack_of(samples: list[Sample]) -> PackTensors:
    return packed(CONTRACT, samples)


def theirs(
    draft: BlockModule, samples: list[Sample], weights: torch.Tensor, **wrong: object
) -> tuple[torch.Tensor, list[int], dict[str, torch.Tensor]]:
    """The oracle's result, counts and gradients.

    Args:
        wrong: fields of `Oracle`, for negative controls.
    """
    draft.zero_grad()
    s, shape = draft.settings, draft.settings.shape
    oracle = Oracle(
        dict(draft.named_parameters()), draft.embedding, draft.target_head, shape.layers, HEADS, KV_HEADS,
        HEAD_DIM, EPS, THETA, shape.block_size, MASK_TOKEN, shape.first_slot, draft.target_bias, s.target_logits.scale,
        s.target_logits.cap,
    )  # fmt: skip
    for name, value in wrong.items():
        setattr(oracle, name, value)
    totals: list[list] = [[], [], [], [], []]
    for number, sample in enumerate(samples):
        # What follows is of other samples: only a block that crosses looks at it.
        joined = samples[number:]
        found = block_losses(
            oracle,
            [i for other in joined for i in other.ids],
            [m for other in joined for m in other.mask],
            sample.aux,
            torch.cat([other.last for other in joined]),
            sample.anchors(s.draw),
            token=s.objective.token,
            distribution=s.objective.distribution,
            distance=s.objective.distance,
            d_pace=s.objective.d_pace,
            confidence=shape.confidence,
            length=len(sample.ids),
        )
        parts = (found.losses, found.correct, found.counts, found.sure, found.sure_right)
        for total, part in zip(totals, parts, strict=True):
            total.append(part)
    sums = ([sum(column) for column in zip(*total, strict=True)] for total in totals)
    losses, correct, counts, sure, sure_right = sums
    if shape.confidence:
        losses, correct = losses + sure, correct + sure_right
    weighted = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in losses]) * weights
    if weighted.requires_grad:
        weighted.sum().backward()
    return torch.stack([weighted.detach(), torch.tensor(correct, dtype=torch.float64)]), counts, gradients_of(draft)


TURNS = [
    [False] * 3 + [True] * 5 + [False] * 2 + [True] * 4, [True], [False, True, True], [True] * 4, [False] * 3,
]  # fmt: skip

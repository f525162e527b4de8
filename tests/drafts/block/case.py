"""Small drafts and packs for the tests of block drafts."""

from __future__ import annotations

import numpy as np
import torch

from specbatch.drafts.block.anchors import Draw, anchors
from specbatch.drafts.block.contract import BlockContract
from specbatch.drafts.block.memory import BlockShape
from specbatch.drafts.block.model import BlockModule, BlockSettings
from specbatch.drafts.block.objective import Objective
from specbatch.drafts.masks import Masks, SampleId
from specbatch.drafts.pack import PackTensors
from specbatch.drafts.rope import Rope
from specbatch.target.logits import PLAIN, Logits
from tests.drafts.block.oracle import Oracle, block_losses

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, EPS, THETA, MASK_TOKEN = 8, 4, 2, 4, 23, 1e-5, 50.0, 22
CONTRACT = BlockContract(aux_layers=(0, 1, 2), hidden=HIDDEN)
EVERY = Draw(7, None)


class Sample:
    """A sample whose target states are random at every position."""

    def __init__(self, mask: list[bool], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = len(mask)
        self.mask, self.id = mask, SampleId(2, seed)
        self.ids = torch.randint(VOCAB - 1, (tokens,), generator=generator).tolist()
        self.aux = torch.randn(tokens, 3 * HIDDEN, dtype=torch.float64, generator=generator)
        self.last = torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator)

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
    rows = [CONTRACT.rows(np.array(s.mask, dtype=bool)) for s in samples]

    def gather(name: str, width: int) -> torch.Tensor:
        parts = [getattr(s, name)[torch.from_numpy(r[name])] for s, r in zip(samples, rows, strict=True)]
        return torch.cat([torch.empty(0, width, dtype=torch.float64), *parts])

    return PackTensors(
        input_ids=torch.tensor([i for s in samples for i in s.ids], dtype=torch.int64),
        loss_mask=torch.tensor([m for s in samples for m in s.mask], dtype=torch.bool),
        lengths=tuple(len(s.mask) for s in samples),
        rows={"aux": gather("aux", 3 * HIDDEN), "last": gather("last", HIDDEN)},
        samples=tuple(s.id for s in samples),
    )


def ours(draft: BlockModule, pack: PackTensors, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Result and gradients."""
    draft.zero_grad()
    result = draft(pack, weights)
    result[0].sum().backward()
    return result.detach(), _gradients(draft)


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
    return torch.stack([weighted.detach(), torch.tensor(correct, dtype=torch.float64)]), counts, _gradients(draft)


def _gradients(draft: BlockModule) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in draft.named_parameters()}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of any gradient."""
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-9)).item() for n in b)


WEIGHTS = 0.8 ** torch.arange(16, dtype=torch.float64) / 7
TURNS = [
    [False] * 3 + [True] * 5 + [False] * 2 + [True] * 4, [True], [False, True, True], [True] * 4, [False] * 3,
]  # fmt: skip

"""Samples, packs and gradients for the tests of several algorithms, in float64."""

from __future__ import annotations

import numpy as np
import torch

from specbatch.drafts.base import CaptureContract
from specbatch.drafts.masks import SampleId
from specbatch.drafts.pack import PackTensors

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, EPS, THETA = 8, 4, 2, 4, 23, 1e-5, 50.0
WEIGHTS = 0.8 ** torch.arange(16, dtype=torch.float64) / 7


class Sample:
    """A sample whose target states are random at every position."""

    tokens = VOCAB
    """Tokens that its text is made of."""

    def __init__(self, mask: list[bool], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        length = len(mask)
        self.mask, self.id = mask, SampleId(2, seed)
        self.ids = torch.randint(self.tokens, (length,), generator=generator).tolist()
        self.aux = torch.randn(length, 3 * HIDDEN, dtype=torch.float64, generator=generator)
        self.last = torch.randn(length, HIDDEN, dtype=torch.float64, generator=generator)


def packed(contract: CaptureContract, samples: list[Sample]) -> PackTensors:
    rows = [contract.rows(np.array(s.mask, dtype=bool)) for s in samples]

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


def ours(
    draft: torch.nn.Module, pack: PackTensors, weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Result and gradients."""
    draft.zero_grad()
    result = draft(pack, weights)
    result[0].sum().backward()
    return result.detach(), gradients_of(draft)


def gradients_of(draft: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in draft.named_parameters()}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of any gradient."""
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-9)).item() for n in b)

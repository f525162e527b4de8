"""The trained module of the toy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from specbatch.drafts.masks import Masks
from specbatch.drafts.pack import PackTensors
from tests.drafts.toy.parallel_head import HeadSettings, learns


class HeadModule(nn.Module):
    """`tests.drafts.toy.parallel_head`."""

    calibrated = ("state",)

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.settings, self.group = settings, None
        self.fc = nn.Linear(2 * settings.hidden, settings.hidden, bias=False)
        self.embedding: Tensor | None = None
        self.target_head: Tensor | None = None

    @torch.no_grad()
    def initialize(
        self,
        seed: int,
        embedding: Tensor,
        target_head: Tensor,
        start: Mapping[str, Tensor] | None = None,
        target_bias: Tensor | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        full = torch.randn(self.fc.weight.shape, generator=generator) * self.fc.weight.shape[1] ** -0.5
        weight = self.fc.weight
        full = full.to(weight.device, weight.dtype)
        weight.copy_(
            distribute_tensor(full, weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else full
        )
        self.embedding, self.target_head = embedding.to(weight.device), target_head.to(weight.device)

    @torch.no_grad()
    def calibrate(self, mean_square: Mapping[str, Tensor]) -> None:
        weight = self.fc.weight.to_local() if isinstance(self.fc.weight, DTensor) else self.fc.weight
        weight[:, : self.settings.hidden] *= mean_square["state"].clamp(min=1e-30).rsqrt().to(weight.dtype)

    def forward(self, pack: PackTensors, weights: Tensor) -> Tensor:
        loss, right, _ = self._compare(pack)
        return torch.stack([loss * weights[0], right])[:, None]

    @torch.no_grad()
    def evaluate(self, pack: PackTensors, weights: Tensor) -> tuple[Tensor, Tensor]:
        loss, right, proposed = self._compare(pack)
        tokens = torch.full((1, len(pack.input_ids)), -1)
        tokens[0, self._newest(pack)] = proposed
        return torch.stack([loss * weights[0], right])[:, None], tokens

    def _compare(self, pack: PackTensors) -> tuple[Tensor, Tensor, Tensor]:
        newest = self._newest(pack)
        embedded = F.embedding(pack.input_ids[newest], self.embedding).to(self.fc.weight.dtype)
        z = self.fc(torch.cat([pack.rows["state"].to(embedded.dtype), embedded], -1))
        head = self.target_head.to(z.dtype)
        log_q = (F.rms_norm(z, z.shape[-1:]) @ head.T).log_softmax(-1)
        p = (pack.rows["final"].to(z.dtype) @ head.T).softmax(-1)
        proposed = log_q.argmax(-1)
        return -(p * log_q).sum(), (proposed == p.argmax(-1)).sum().to(z.dtype), proposed

    @staticmethod
    def _newest(pack: PackTensors) -> Tensor:
        masks = Masks(pack.loss_mask.numpy(), np.array(pack.lengths, np.int64))
        return torch.from_numpy(np.flatnonzero(learns(masks)))

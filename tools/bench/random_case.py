"""A random draft and pack for `step`; on torch's meta device they have only shapes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from specbatch.drafts.base import CaptureContract
from specbatch.drafts.masks import SampleId
from specbatch.drafts.pack import PackTensors


def random_case(
    module: type, settings: Any, contract: CaptureContract, masks: list[Tensor], device: torch.device,
    dtype: torch.dtype, *, tokens: int, samples: tuple[SampleId, ...] = (),
) -> tuple[Any, PackTensors, list[tuple[Tensor, Tensor]]]:  # fmt: skip
    """Make a draft and a pack.

    Args:
        tokens: the text has those below.

    Returns:
        both, and aux and last hidden states at every position of each sample.
    """
    generator, meta = torch.Generator().manual_seed(0), device.type == "meta"

    def random(*size: int) -> Tensor:
        if meta:
            return torch.empty(*size, dtype=torch.bfloat16, device=device)
        return torch.randn(*size, generator=generator, dtype=torch.float32).to(torch.bfloat16)

    vocab, hidden = settings.shape.vocab, settings.shape.hidden
    embedding, target_head = random(vocab, hidden), random(vocab, hidden) * 0.05
    with torch.device("meta") if meta else contextlib.nullcontext():
        draft = module(settings)
    if not meta:
        draft.initialize(0, embedding, target_head)
    draft.to(device, dtype)
    draft.attach(embedding.to(device), target_head.to(device, dtype))
    states = [tuple(random(len(mask), width) for width in contract.widths.values()) for mask in masks]
    rows = [contract.rows(mask.numpy()) for mask in masks]
    pack = PackTensors(
        input_ids=torch.randint(tokens, (sum(map(len, masks)),), generator=generator).to(device),
        loss_mask=torch.cat(masks),
        lengths=tuple(map(len, masks)),
        rows={
            name: torch.cat([pair[i][r[name]] for pair, r in zip(states, rows, strict=True)]).to(device)
            for i, name in enumerate(contract.widths)
        },
        samples=samples,
    )
    return draft, pack, [(aux.to(device), last.to(device)) for aux, last in states]

"""A draft and a pack for `step`: random, or only shapes."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specbatch.drafts.eagle3.contract import Eagle3Contract
from specbatch.drafts.eagle3.memory import Shape, StepWork, default_columns_at_once, step_bytes
from specbatch.drafts.eagle3.model import Eagle3Module, Eagle3Settings
from specbatch.drafts.pack import PackTensors
from specbatch.drafts.rope import Rope
from tools.bench.step_data import SHAPES, TOY, TOY_SHAPE, conversations


@dataclass(frozen=True)
class Case:
    """The draft and the pack of a step."""

    shape: Shape
    draft: Eagle3Module
    pack: PackTensors
    states: list[tuple[Tensor, Tensor]]
    """aux and last hidden states at every position of each sample."""
    weights: Tensor
    """Weight of each unrolled step's summed cross-entropy, float32 ``[K]``."""
    work: StepWork

    @property
    def parts(self) -> dict[str, int]:
        """Return the bytes that a step takes, by kind, by formula."""
        return step_bytes(self.shape, self.work)


def make_case(options: argparse.Namespace, device: torch.device, dtype: torch.dtype, **switches: bool) -> Case:
    """Make random weights and a random pack; on torch's meta device they have only shapes.

    Args:
        switches: fields of `Shape`: ``own_embedding``, ``fc_norm``, ``norm_output``.
    """
    shape = Shape(*(TOY_SHAPE if options.shape == TOY else SHAPES[options.shape]), **switches)
    if options.draft_vocab:
        shape = replace(shape, draft_vocab=options.draft_vocab)
    contract = Eagle3Contract((0, 1, 2), shape.hidden)
    config = Eagle3Settings(
        shape=shape,
        rms_norm_eps=1e-5,
        rope=Rope(shape.head_dim, 1e5, 1 << 18),
        ttt_steps=options.ttt_steps,
        draft_ids=tuple(range(shape.draft_vocab)),
    )
    generator = torch.Generator().manual_seed(0)
    meta = device.type == "meta"

    def random(*size: int) -> Tensor:
        if meta:
            return torch.empty(*size, dtype=torch.bfloat16, device=device)
        return torch.randn(*size, generator=generator, dtype=torch.float32).to(torch.bfloat16)

    embedding, target_head = random(shape.vocab, shape.hidden), random(shape.vocab, shape.hidden) * 0.05
    with torch.device("meta") if meta else contextlib.nullcontext():
        draft = Eagle3Module(config)
    if not meta:
        draft.initialize(0, embedding, target_head)
    draft.to(device, dtype)
    draft.attach(embedding.to(device), target_head.to(device, dtype))
    draft.recompute = options.recompute
    gpu = device.type != "cpu"
    draft.columns_at_once = options.columns_at_once or default_columns_at_once(gpu=gpu)
    masks = [torch.tensor(mask) for mask in conversations(options.tokens, options.mean_length, options.loss_fraction)]
    states = [(random(len(mask), 3 * shape.hidden), random(len(mask), shape.hidden)) for mask in masks]
    rows = [contract.rows(mask.numpy()) for mask in masks]
    pack = PackTensors(
        input_ids=torch.randint(shape.vocab, (options.tokens,), generator=generator).to(device),
        loss_mask=torch.cat(masks),
        lengths=tuple(map(len, masks)),
        rows={
            name: torch.cat([pair[i][r[name]] for pair, r in zip(states, rows, strict=True)]).to(device)
            for i, name in enumerate(contract.widths)
        },
    )
    return Case(
        shape=shape,
        draft=draft,
        pack=pack,
        states=[(aux.to(device), last.to(device)) for aux, last in states],
        weights=0.8 ** torch.arange(options.ttt_steps, device=device, dtype=torch.float32) / options.tokens,
        work=StepWork(
            tokens=options.tokens, ttt_steps=options.ttt_steps, columns_at_once=draft.columns_at_once,
            recompute=options.recompute, value_bytes=dtype.itemsize, gpu=gpu,
        ),
    )  # fmt: skip

"""A draft and a pack for `step`: random, or of shapes alone."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specbatch.capture import CaptureContract
from specbatch.training.drafts.eagle3 import Eagle3, Eagle3Config, Recompute
from specbatch.training.drafts.pack import PackTensors
from specbatch.training.drafts.rope import Rope
from specbatch.training.memory import Shape, Work, default_columns_at_once, step_bytes
from tools.bench.step_data import SHAPES, TOY, TOY_SHAPE, conversations


@dataclass(frozen=True)
class Case:
    """What a step is done with."""

    shape: Shape
    draft: Eagle3
    pack: PackTensors
    states: list[tuple[Tensor, Tensor]]
    """aux and last hidden states at every position of each sample."""
    weights: Tensor
    """float32 ``[K]``, of each unrolled step's summed cross-entropy."""
    work: Work


def make_case(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, *, own_embedding: bool = False
) -> Case:
    """Random weights and a random pack; on torch's meta device, of which nothing is known but shapes.

    Args:
        own_embedding: the draft trains an embedding, instead of reading the target's.
    """
    shape = Shape(*(TOY_SHAPE if options.shape == TOY else SHAPES[options.shape]), own_embedding=own_embedding)
    if options.draft_vocab:
        shape = replace(shape, draft_vocab=options.draft_vocab)
    contract = CaptureContract((0, 1, 2), shape.hidden)
    config = Eagle3Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope=Rope(shape.head_dim, 1e5, 1 << 18),
        ttt_steps=options.ttt_steps,
        draft_ids=tuple(range(shape.draft_vocab)),
        contract=contract,
        embedding_rows=shape.vocab if own_embedding else 0,
    )
    generator = torch.Generator().manual_seed(0)
    meta = device.type == "meta"

    def random(*size: int) -> Tensor:
        if meta:
            return torch.empty(*size, dtype=torch.bfloat16, device=device)
        return torch.randn(*size, generator=generator, dtype=torch.float32).to(torch.bfloat16)

    embedding, target_head = random(shape.vocab, shape.hidden), random(shape.vocab, shape.hidden) * 0.05
    with torch.device("meta") if meta else contextlib.nullcontext():
        draft = Eagle3(config)
    if not meta:
        draft.initialize(0, embedding, target_head)
    draft.to(device, dtype)
    draft.attach(embedding.to(device), target_head.to(device, dtype))
    draft.recompute = Recompute(options.recompute)
    gpu = device.type != "cpu"
    draft.columns_at_once = options.columns_at_once or default_columns_at_once(gpu=gpu)
    masks = [torch.tensor(mask) for mask in conversations(options.tokens, options.mean_length, options.loss_fraction)]
    states = [(random(len(mask), 3 * shape.hidden), random(len(mask), shape.hidden)) for mask in masks]
    # What is captured (`specbatch.capture`): positions before loss tokens, and all columns before the last of them.
    targets = [mask[2:].nonzero().flatten() + 1 for mask in masks]
    pack = PackTensors(
        input_ids=torch.randint(shape.vocab, (options.tokens,), generator=generator).to(device),
        loss_mask=torch.cat(masks),
        lengths=tuple(map(len, masks)),
        aux=torch.cat([aux[: t[-1] if len(t) else 0] for (aux, _), t in zip(states, targets, strict=True)]).to(device),
        last=torch.cat([last[t] for (_, last), t in zip(states, targets, strict=True)]).to(device),
    )
    return Case(
        shape=shape,
        draft=draft,
        pack=pack,
        states=[(aux.to(device), last.to(device)) for aux, last in states],
        weights=0.8 ** torch.arange(options.ttt_steps, device=device, dtype=torch.float32) / options.tokens,
        work=Work(
            tokens=options.tokens, ttt_steps=options.ttt_steps, columns_at_once=draft.columns_at_once,
            recompute=options.recompute, value_bytes=dtype.itemsize, gpu=gpu,
        ),
    )  # fmt: skip


def predicted_bytes(case: Case) -> int:
    """By formula: what a step takes beside weights and packs."""
    parts = step_bytes(case.shape, case.work)
    # Sums become gradients, but for that of the first projection, which is made apart.
    return sum(parts.values()) - parts["pack"] + case.shape.first * case.work.value_bytes

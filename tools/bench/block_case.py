"""A block draft and a random pack for `step.py --algorithm dflash`."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from specbatch.drafts.block.anchors import Draw
from specbatch.drafts.block.contract import BlockContract, is_candidate
from specbatch.drafts.block.cost import counts_of
from specbatch.drafts.block.memory import BlockShape, BlockWork, default_slots_at_once, step_bytes
from specbatch.drafts.block.model import BlockModule, BlockSettings
from specbatch.drafts.block.objective import Objective
from specbatch.drafts.masks import Masks, SampleId
from specbatch.drafts.pack import PackTensors
from specbatch.drafts.rope import Rope
from tools.bench.step_data import SHAPES, TOY, TOY_SHAPE, conversations

AUX_LAYERS = 5


@dataclass(frozen=True)
class Case:
    """The draft and the pack of a step."""

    draft: BlockModule
    pack: PackTensors
    states: list[tuple[Tensor, Tensor]]
    """aux and last hidden states at every position of each sample."""
    weights: Tensor
    """Weight of each term's sum, float32 ``[K]``."""
    shape: BlockShape
    work: BlockWork

    @property
    def parts(self) -> dict[str, int]:
        """Return the bytes that a step takes, by kind, by formula."""
        return step_bytes(self.shape, self.work)


def make_case(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Case:
    """Make random weights and a random pack; on torch's meta device they have only shapes."""
    hidden, intermediate, heads, kv_heads, head_dim, vocab, _ = (
        TOY_SHAPE if options.shape == TOY else SHAPES[options.shape]
    )
    shape = BlockShape(
        hidden, intermediate, heads, kv_heads, head_dim, vocab, AUX_LAYERS, options.layers, options.block_size, 1
    )
    contract = BlockContract(tuple(range(AUX_LAYERS)), hidden)
    generator = torch.Generator().manual_seed(0)

    meta = device.type == "meta"

    def random(*size: int) -> Tensor:
        if meta:
            return torch.empty(*size, dtype=torch.bfloat16, device=device)
        return torch.randn(*size, generator=generator, dtype=torch.float32).to(torch.bfloat16)

    masks = [torch.tensor(mask) for mask in conversations(options.tokens, options.mean_length, options.loss_fraction)]
    samples = tuple(SampleId(0, number) for number in range(len(masks)))
    known = Masks.of([mask.numpy() for mask in masks], samples)
    draw = Draw(0, most_a_sample(known, options.anchors) if options.anchors else None)
    gpu = device.type != "cpu"
    settings = BlockSettings(
        shape=shape,
        rms_norm_eps=1e-5,
        rope=Rope(shape.head_dim, 1e5, 1 << 18),
        mask_token_id=shape.vocab - 1,
        draw=draw,
        objective=Objective(distribution=1.0),
        slots_at_once=options.columns_at_once or default_slots_at_once(gpu=gpu),
        recompute=options.recompute,
    )
    with torch.device("meta") if meta else contextlib.nullcontext():
        draft = BlockModule(settings)
    embedding, target_head = random(vocab, hidden), random(vocab, hidden) * 0.05
    if not meta:
        draft.initialize(0, embedding, target_head)
    draft.to(device, dtype)
    draft.attach(embedding.to(device), target_head.to(device, dtype))
    states = [(random(len(mask), AUX_LAYERS * hidden), random(len(mask), hidden)) for mask in masks]
    rows = [contract.rows(mask.numpy()) for mask in masks]
    aux = torch.cat([aux[torch.from_numpy(row["aux"])] for (aux, _), row in zip(states, rows, strict=True)])
    last = torch.cat([last[torch.from_numpy(row["last"])] for (_, last), row in zip(states, rows, strict=True)])
    learning = counts_of(known, draw, shape)
    work = BlockWork(
        tokens=options.tokens, slots_at_once=draft.slots_at_once, recompute=options.recompute,
        value_bytes=dtype.itemsize, gpu=gpu,
    )  # fmt: skip
    return Case(
        draft=draft,
        pack=PackTensors(
            input_ids=torch.randint(vocab - 1, (options.tokens,), generator=generator).to(device),
            loss_mask=torch.cat(masks),
            lengths=tuple(map(len, masks)),
            rows={"aux": aux.to(device), "last": last.to(device)},
            samples=samples,
        ),
        states=[(aux.to(device), last.to(device)) for aux, last in states],
        weights=torch.exp(-torch.arange(shape.proposals, device=device) / 4) / int(learning.sum()),
        shape=shape,
        work=work,
    )


def most_a_sample(masks: Masks, anchors: int) -> int:
    """Return the least limit of blocks per sample with which the pack has at least this many blocks, if it can."""
    each = masks.total(is_candidate(masks))
    return next((most for most in range(1, int(each.max())) if each.clip(max=most).sum() >= anchors), int(each.max()))

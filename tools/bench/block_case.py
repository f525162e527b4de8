"""A block draft and a random pack for `step.py --algorithm dflash`."""

from __future__ import annotations

import argparse
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
from tools.bench.random_case import random_case
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
    sizes = (TOY_SHAPE if options.shape == TOY else SHAPES[options.shape])[:-1]
    shape = BlockShape(*sizes, AUX_LAYERS, options.layers, options.block_size, 1)
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
    contract = BlockContract(tuple(range(AUX_LAYERS)), shape.hidden)
    draft, pack, states = random_case(
        BlockModule, settings, contract, masks, device, dtype, tokens=shape.vocab - 1, samples=samples
    )
    learning = counts_of(known, draw, shape)
    work = BlockWork(
        tokens=options.tokens, slots_at_once=draft.slots_at_once, recompute=options.recompute,
        value_bytes=dtype.itemsize, gpu=gpu,
    )  # fmt: skip
    return Case(
        draft=draft,
        pack=pack,
        states=states,
        weights=torch.exp(-torch.arange(shape.proposals, device=device) / 4) / int(learning.sum()),
        shape=shape,
        work=work,
    )


def most_a_sample(masks: Masks, anchors: int) -> int:
    """Return the least limit of blocks per sample with which the pack has at least this many blocks, if it can."""
    each = masks.total(is_candidate(masks))
    return next((most for most in range(1, int(each.max())) if each.clip(max=most).sum() >= anchors), int(each.max()))

"""A draft and a pack for `step`: random, or only shapes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specbatch.drafts.eagle3.contract import Eagle3Contract
from specbatch.drafts.eagle3.memory import Shape, StepWork, default_columns_at_once, step_bytes
from specbatch.drafts.eagle3.model import Eagle3Module, Eagle3Settings
from specbatch.drafts.pack import PackTensors
from specbatch.drafts.rope import Rope
from tools.bench.random_case import random_case
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
    gpu = device.type != "cpu"
    config = Eagle3Settings(
        shape=shape,
        rms_norm_eps=1e-5,
        rope=Rope(shape.head_dim, 1e5, 1 << 18),
        ttt_steps=options.ttt_steps,
        draft_ids=tuple(range(shape.draft_vocab)),
        columns_at_once=options.columns_at_once or default_columns_at_once(gpu=gpu),
        recompute=options.recompute,
    )
    masks = [torch.tensor(mask) for mask in conversations(options.tokens, options.mean_length, options.loss_fraction)]
    contract = Eagle3Contract((0, 1, 2), shape.hidden)
    draft, pack, states = random_case(Eagle3Module, config, contract, masks, device, dtype, tokens=shape.vocab)
    return Case(
        shape=shape,
        draft=draft,
        pack=pack,
        states=states,
        weights=0.8 ** torch.arange(options.ttt_steps, device=device, dtype=torch.float32) / options.tokens,
        work=StepWork(
            tokens=options.tokens, ttt_steps=options.ttt_steps, columns_at_once=draft.columns_at_once,
            recompute=options.recompute, value_bytes=dtype.itemsize, gpu=gpu,
        ),
    )  # fmt: skip

"""`tools/bench/step.py --algorithm dflash`: what it compares is the same, and what it counts."""

from __future__ import annotations

import argparse
import sys

import pytest
import torch

from specbatch.drafts.block.blocks import locate
from tools.bench import step
from tools.bench.block_case import Case, make_case
from tools.bench.held import held, step_peak
from tools.bench.plain_dflash import plain_step
from tools.bench.step_data import TOY

CPU = torch.device("cpu")


def case(anchors: int, **changes: object) -> Case:
    options = {
        "shape": TOY, "tokens": 2048, "mean_length": 256, "loss_fraction": 0.33, "layers": 2, "block_size": 4,
        "anchors": anchors, "columns_at_once": 64, "recompute": "none",
    }  # fmt: skip
    return make_case(argparse.Namespace(**options | changes), CPU, torch.float32)


@pytest.mark.parametrize("tokens", [300, 2048])
def test_the_plain_step_has_the_loss_and_the_gradients_of_ours(tokens):
    made = case(100, tokens=tokens)
    made.draft(made.pack, made.weights)[0].sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in made.draft.named_parameters()}
    made.draft.zero_grad()
    loss = plain_step(made.draft, made.pack, made.states, made.weights)
    torch.testing.assert_close(made.draft(made.pack, made.weights)[0].sum(), loss, rtol=1e-5, atol=1e-6)
    for name, parameter in made.draft.named_parameters():
        torch.testing.assert_close(parameter.grad, ours[name], rtol=1e-3, atol=1e-6)


def test_memory_is_that_of_few_blocks_for_many():
    few, many = (step_peak(case(anchors), CPU) for anchors in (32, 400))
    assert many < 1.15 * few


def test_as_many_blocks_are_drawn_as_asked_for():
    for anchors in (32, 300):
        made = case(anchors)
        blocks = len(locate(made.pack, made.draft.settings.draw, made.draft.settings.shape.proposals).chosen)
        assert anchors <= blocks < anchors + len(made.pack.samples)


def test_what_a_gpu_holds_is_counted_without_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step.py", "--algorithm", "dflash", "--tokens", "2048", "--memory"])
    found = held(step.parse())
    assert 0.9 < found["predicted_bytes"] / found["peak_bytes"] < 1.2

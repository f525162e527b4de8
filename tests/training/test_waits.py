"""Each pack sends nothing to the device, besides its rows, for which the host would wait.

torch's meta device has no values, so whatever is copied there is known to be a copy to a device.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specbatch.plan import Pack
from specbatch.training.feed.dataloader import PackLoader
from specbatch.training.feed.device_copy import StepWeights

DEVICE = torch.device("meta")
PACKS = 3


class Copies(TorchDispatchMode):
    """Counts copies of values from the host to the device, and those among them for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.waited = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device == DEVICE and args[0].numel():
            self.all += 1
            self.waited += not (kwargs or {}).get("non_blocking")
        return result


class Steps:
    """Facts of steps that have `PACKS` packs."""

    def facts(self, step: int) -> Any:
        packs = tuple(Pack(0, step * PACKS + i, (i,)) for i in range(PACKS))
        return SimpleNamespace(packs=packs, weights=np.full(7, step, dtype=np.float32))


class Corpus:
    def sample(self, index: int) -> Any:
        return SimpleNamespace(loss_mask=np.ones(10 + index, dtype=bool))


def test_the_host_waits_for_no_copy_of_labels_or_weights() -> None:
    steps: Any = Steps()
    loader = PackLoader(SimpleNamespace(steps=steps, corpus=Corpus()))  # type: ignore[arg-type]
    weights, batches = StepWeights(steps, DEVICE), iter(loader)
    turns = []
    with Copies() as seen:
        for _ in range(2 * PACKS):
            entry, labels = next(batches)
            labels.to(DEVICE)  # as torchtitan does
            turns.append(entry["input"])
            assert weights.of(turns[-1].step).shape == (7,)
    assert (seen.all, seen.waited) == (2, 0), "the weights of two steps"
    assert [(turn.step, turn.index, turn.last, turn.tokens) for turn in turns[2:4]] == [
        (1, 2, True, 12),
        (2, 0, False, 10),
    ]


def test_a_copy_that_is_waited_for_would_be_seen() -> None:
    with Copies() as seen:
        torch.ones(1).to(DEVICE)
    assert (seen.all, seen.waited) == (1, 1)

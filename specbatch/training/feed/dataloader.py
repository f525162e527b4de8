"""The data loader of torchtitan's trainer: yields one pack for each micro-batch, by name only.

torchtitan fetches all micro-batches of a step before it trains the first. A pack's hidden states are taken
from the prefetcher only when its turn comes (`specbatch.training.trainer`), so no step is held whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader

from specbatch.training.feed.steps import Steps

if TYPE_CHECKING:
    from specbatch.corpus import Corpus


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch: this rank's ``index``-th pack of a step."""

    step: int
    index: int
    last: bool
    """Whether this is the rank's last pack of the step."""
    tokens: int
    """Tokens of the pack."""


class PackLoader(BaseDataLoader):
    """Iterates over the packs of this rank in the plan's order. Its whole state is the number of steps done."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        steps: Steps
        corpus: Corpus

        def to_dict(self) -> dict[str, Any]:
            return {"samples": len(self.corpus)}

    def __init__(self, config: Config, **unused: Any) -> None:
        self._steps, self._corpus = config.steps, config.corpus
        self.step = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield a `MicroBatch` under ``input``, with empty labels: the loss needs none, and torchtitan would make
        the host wait for the device at each copy of labels."""
        while True:
            packs = self._steps.facts(self.step + 1).packs
            for index, pack in enumerate(packs):
                tokens = sum(len(self._corpus.sample(sample).loss_mask) for sample in pack.samples)
                turn = MicroBatch(self.step + 1, index, last=index + 1 == len(packs), tokens=tokens)
                self.step += turn.last
                yield {"input": turn}, torch.empty((1, 0), dtype=torch.int64)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.step = state_dict["step"]

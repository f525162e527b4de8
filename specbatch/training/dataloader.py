"""What torchtitan's trainer reads: for every micro-batch one pack, of which only the name is there yet.

torchtitan fetches all micro-batches of a step before it trains the first. A pack's hidden states are taken
from the prefetcher only when its turn comes (`specbatch.training.trainer`), so no step is held whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX

from specbatch.plan import Pack
from specbatch.training.steps import Steps

if TYPE_CHECKING:
    from specbatch.corpus import Corpus


@dataclass(frozen=True)
class Turn:
    """A micro-batch: this rank's ``index``-th pack of a step."""

    step: int
    index: int
    last: bool
    """Whether it is this rank's last of the step."""


class PackLoader(BaseDataLoader):
    """The packs of this rank in the plan's order. Its whole state is the number of steps done."""

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
        """Yield a `Turn` under ``input``, and labels int64 ``[1, tokens]`` from which loss tokens are counted."""
        while True:
            packs = self._steps.facts(self.step + 1).packs
            for index, pack in enumerate(packs):
                turn = Turn(self.step + 1, index, last=index + 1 == len(packs))
                self.step += turn.last
                yield {"input": turn}, self._labels(pack)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.step = state_dict["step"]

    def _labels(self, pack: Pack) -> Tensor:
        samples = [self._corpus.sample(index) for index in pack.samples]
        labels = [np.where(sample.loss_mask, sample.input_ids, IGNORE_INDEX).astype(np.int64) for sample in samples]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *labels]))[None]

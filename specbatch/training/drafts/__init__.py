"""Draft algorithms behind one interface: whoever trains, exports, measures or plans asks it by ``draft.algorithm``.

A new algorithm (EAGLE-3.1, a draft with latent attention, P-EAGLE, DFlash, ...) is a name in `ALGORITHMS` and two
modules here, so that nobody needs torch who only wants to know about files:

- ``<name>_training`` with all that `Training` lists: the ``torch.nn.Module``, what it is made from, and how many
  columns of a sample enter the loss of each of its steps, from the mask alone, so that every rank knows the
  denominators of a step beforehand. The module has

  - ``forward(pack, weights)``: of a `pack.PackTensors`, the weighted losses and the numbers of right proposals of its
    steps, float ``[2, K]``; the sum of the first row is differentiated;
  - ``evaluate(pack, weights)``: the same without gradient, and which token greedy drafting proposes from each position;
  - ``initialize(seed, embedding, target_head, start)``: its first weights, the same for every number of ranks, and the
    target's tensors that it reads;
  - ``calibrate(mean_square)``: fit it to the scale of the target's states before the first step;
  - parameters with the names that engines load;

- ``<name>_files`` with all that `Files` lists: names and shapes in a checkpoint, config.json, where training may start
  from, and what SGLang has to be told.

Which layers and rows of the target it reads is a `specbatch.capture.CaptureContract`, made by
`specbatch.target.capture_contract`. Plan, dispatcher, store, engines, dataloader and trainer know nothing else about
drafts. Its operations and its memory are worked out by `specbatch.budget` and `memory` by EAGLE-3's formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import numpy as np
    import torch

    from specbatch.config import Config
    from specbatch.corpus import Corpus
    from specbatch.target import TargetShape
    from specbatch.training.drafts.pack import Share
    from specbatch.training.drafts.published import Published

ALGORITHMS = ("eagle3",)


class Training(Protocol):
    """What training asks of an algorithm."""

    Draft: type[torch.nn.Module]
    """Made from one argument, what `settings` gives."""

    def settings(self, config: Config, target: TargetShape, corpus: Corpus) -> Any:
        """What a draft is made from. It has ``draft_ids``, the target's ids of its vocabulary, ascending, and
        ``ttt_steps``."""

    def supervised_counts(self, loss_mask: np.ndarray, ttt_steps: int) -> np.ndarray:
        """int64 ``[ttt_steps]``: columns of a sample that enter the loss of each step."""

    def part_of(
        self, loss_mask: torch.Tensor, lengths: tuple[int, ...], share: Share, ttt_steps: int
    ) -> dict[str, torch.Tensor]:
        """int64: rows of each tensor that a rank reads of a pack that several ranks train together."""


class Files(Protocol):
    """What is asked of an algorithm by those who read and write its files."""

    TITLE: str
    """For people."""
    SGLANG: Mapping[str, Any]
    """Arguments with which SGLang serves such a draft, besides its directory and the number of tokens."""

    def shapes(
        self, target: TargetShape, aux_states: int, intermediate: int, draft_vocab: int
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its parameters in a checkpoint."""

    def draft_config(
        self,
        target: TargetShape,
        *,
        target_name: str,
        aux_layers: tuple[int, ...],
        intermediate: int,
        draft_vocab: int,
        draft_tokens: int,
        own_embedding: bool = False,
    ) -> dict[str, Any]:
        """config.json of a checkpoint."""

    def read_published(self, config: Config, target: TargetShape) -> Published:
        """The draft on disk that a run starts from (``draft.init_from``), checked."""

    def starting_tensors(
        self, published: Published, draft_ids: tuple[int, ...], target_head: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Its parameters, for a draft with this vocabulary."""


def training(algorithm: str) -> Training:
    """The module that trains it.

    Args:
        algorithm: of `ALGORITHMS`.
    """
    return cast(Training, import_module(f"{__name__}.{algorithm}_training"))


def files(algorithm: str) -> Files:
    """The module that knows its files.

    Args:
        algorithm: of `ALGORITHMS`.
    """
    return cast(Files, import_module(f"{__name__}.{algorithm}_files"))

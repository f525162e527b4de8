"""Interfaces that the trainer uses: implemented by a live run's dispatcher and store, or by a recording."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from specbatch.dispatch.messages import Go
from specbatch.drafts.pack import PackTensors
from specbatch.plan import Pack


class Conductor(Protocol):
    """Decides whether a step may begin (`specbatch.dispatch.client.Client`)."""

    def join(self, rank: int, world: int, segment: str, segment_bytes: int, step: int, generation: int = 0) -> None: ...

    def begin(self, rank: int, step: int) -> Go: ...


class PackSource(Protocol):
    """The packs of a rank, step by step (`specbatch.training.feed.prefetcher.Prefetcher`)."""

    def start(self, trained: int) -> None: ...

    def take(self, step: int, index: int) -> PackTensors: ...

    def release(self, step: int, index: int) -> None: ...

    def give_up(self, step: int, index: int, why: str) -> None: ...

    def take_waited_s(self) -> float: ...

    def void(self, step: int) -> dict[str, str]: ...

    def finish(self, step: int) -> None: ...


class Observer(Protocol):
    """Is called with what a rank trained, in order: each pack of a step, then the step."""

    def start(self, trained: int) -> None:
        """Called when training continues after the given number of steps."""

    def pack(self, pack: Pack, tensors: PackTensors, result: Tensor, void: dict[str, str]) -> None:
        """Called when a pack was trained.

        Args:
            tensors: valid until this returns.
            result: float ``[2, T]`` (`specbatch.training.metrics.DraftLoss`).
            void: packs of the step that train as zero, and why.
        """

    def step(self, line: dict[str, Any]) -> None:
        """Called when a step was trained.

        Args:
            line: its metrics.
        """

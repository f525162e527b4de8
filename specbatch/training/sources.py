"""What the trainer needs of others, whoever they are: a live run's dispatcher and store, or a recording."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from specbatch.dispatch.messages import Go
from specbatch.plan import Pack
from specbatch.training.drafts.pack import PackTensors


class Conductor(Protocol):
    """Says whether a step may begin (`specbatch.dispatch.client.Client`)."""

    def join(self, rank: int, world: int, segment: str, segment_bytes: int, step: int, generation: int = 0) -> None: ...

    def begin(self, rank: int, step: int) -> Go: ...


class PackSource(Protocol):
    """The packs of a rank, step by step (`specbatch.training.fetch.Prefetcher`)."""

    def start(self, trained: int) -> None: ...

    def take(self, step: int, index: int) -> PackTensors: ...

    def release(self, step: int, index: int) -> None: ...

    def give_up(self, step: int, index: int, why: str) -> None: ...

    def take_waited_s(self) -> float: ...

    def void(self, step: int) -> dict[str, str]: ...

    def finish(self, step: int) -> None: ...


class Observer(Protocol):
    """Is shown what a rank trains, in order: its packs of a step, and then the step."""

    def start(self, trained: int) -> None:
        """Training goes on after so many steps."""

    def pack(self, pack: Pack, tensors: PackTensors, result: Tensor, void: dict[str, str]) -> None:
        """A pack was trained.

        Args:
            tensors: good until this returns.
            result: float ``[2, K]`` (`specbatch.training.metrics.UnrolledLoss`).
            void: packs of the step that train as zero, and why.
        """

    def step(self, line: dict[str, Any]) -> None:
        """A step was trained.

        Args:
            line: its metrics.
        """

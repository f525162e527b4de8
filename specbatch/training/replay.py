"""Recorded steps in the place of a live run: where packs come from, who lets steps begin, and what came out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specbatch.capture import CaptureContract
from specbatch.dispatch.messages import Go, Phase
from specbatch.errors import RunError
from specbatch.manifest import PackId
from specbatch.plan import Pack, Plan
from specbatch.snapshot.recording import RecordedPack, RecordedStep
from specbatch.training.buffers import empty_pack
from specbatch.training.drafts.pack import PackTensors, Share
from specbatch.training.steps import Steps

COMPARED = ("loss", "losses", "accuracy", "grad_norm")
"""What a step's metrics say of its arithmetic."""


class RepeatedPlan:
    """The recorded steps of a plan, over and over: step 1 is the first of them.

    Args:
        first: the first recorded step.
        count: how many follow each other.
        epochs: passes over them.
    """

    def __init__(self, plan: Plan, *, first: int, count: int, epochs: int) -> None:
        self._plan, self.first, self.count, self.epochs = plan, first, count, epochs

    @property
    def packs_per_step(self) -> int:
        return self._plan.packs_per_step

    @property
    def steps(self) -> int:
        return self.count * self.epochs

    def recorded(self, step: int) -> int:
        """Which recorded step a step repeats."""
        return self.first + (step - 1) % self.count

    def assign(self, step: int, ranks: int) -> list[list[Pack]]:
        return self._plan.assign(self.recorded(step), ranks)

    def tokens(self, pack: Pack) -> int:
        return self._plan.tokens(pack)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What makes it this plan."""
        recorded = {"first": self.first, "count": self.count, "epochs": self.epochs}
        return {**self._plan.fingerprint, "recorded": recorded}


class Alone:
    """Lets every step begin up to a last one, or until somebody asks to stop (`specbatch.training.sources.Conductor`).

    Args:
        asked: whether somebody did; only that of rank 0 is called, so that all ranks stop after the same step. None:
            nobody can.
        device: the rank's.
    """

    def __init__(self, last_step: int, asked: Callable[[], bool] | None, device: torch.device) -> None:
        self._last_step, self._asked, self._device = last_step, asked, device

    def join(self, rank: int, world: int, segment: str, segment_bytes: int, step: int, generation: int = 0) -> None:
        """Nobody waits for anybody."""

    def begin(self, rank: int, step: int) -> Go:
        if step > self._last_step:
            return Go(False, Phase.STOP, "all wanted steps are trained")
        return Go(False, Phase.STOP, "asked to stop") if self._is_asked(rank) else Go(True, Phase.WORK)

    def _is_asked(self, rank: int) -> bool:
        if self._asked is None:
            return False
        asked = torch.tensor(rank == 0 and self._asked(), dtype=torch.int32, device=self._device)
        dist.broadcast(asked, 0)
        return bool(asked)


PartOf = Callable[[Tensor, tuple[int, ...], Share], dict[str, Tensor]]
"""The rows of each tensor that a share of a pack has, from its loss mask and lengths, ascending."""


class Recordings:
    """The packs of a rank out of recordings (`specbatch.training.sources.PackSource`). What ranks that trained a pack
    together had of it is put together, and divided again among as many as train it now.

    Args:
        recordings: their folder.
        steps: which packs this rank trains.
        plan: translates steps; None: they are the recorded ones.
        share: which part of its packs this rank trains.
        had: what each share had when it was recorded.
        has: what each share has now.
    """

    def __init__(
        self,
        recordings: Path,
        steps: Steps,
        *,
        plan: RepeatedPlan | None,
        share: Share,
        had: PartOf,
        has: PartOf,
        contract: CaptureContract,
        device: torch.device,
    ) -> None:
        self._recordings, self._steps, self._plan = recordings, steps, plan
        self._share, self._had, self._has = share, had, has
        self._contract, self._device = contract, device
        self._open: RecordedStep | None = None
        self._void: dict[str, str] = {}
        self._waited_s = 0.0

    def start(self, trained: int) -> None:
        """Nothing is fetched ahead."""

    def take(self, step: int, index: int) -> PackTensors:
        """A pack, read and checked.

        Raises:
            DamagedSnapshot: naming file and dataset.
            RunError: the pack was not recorded.
        """
        begun = time.perf_counter()
        pack = self._steps.facts(step).packs[index]
        together = self._step(step).together
        parts = [self._recorded(step, pack.id, share) for share in range(together)]
        self._waited_s += time.perf_counter() - begun
        found = parts[0]
        if found.void:
            self._void[f"{pack.epoch}.{pack.index}"] = found.void
        if not found.lengths:
            return empty_pack(self._contract, self._device)
        tensors = found.tensors
        if (together, self._share.ranks) != (1, 1):
            tensors = {**tensors, **divide(join(parts, self._had), found, self._has, self._share)}
        moved = {name: tensor.to(self._device) for name, tensor in tensors.items() if name != "loss_mask"}
        return PackTensors(
            moved["input_ids"], tensors["loss_mask"], found.lengths, moved["aux"], moved["last"], self._share
        )

    def result(self, step: int, pack: PackId) -> Tensor | None:
        """What this rank's part of a pack gave when it was recorded; None if packs had other parts then. Raises as
        `take`."""
        together = self._step(step).together
        return self._recorded(step, pack, self._share.rank).result if together == self._share.ranks else None

    def _recorded(self, step: int, pack: PackId, share: int) -> RecordedPack:
        found = self._step(step).read(pack, share)
        if found is None:
            raise RunError(f"{self._recordings}: pack {pack[0]}.{pack[1]} of step {step} was not recorded")
        return found

    def line(self, step: int) -> dict[str, Any]:
        """The metrics of a step as they were recorded."""
        return self._step(step).line

    def release(self, step: int, index: int) -> None:
        """Its memory goes with the last that uses it."""

    def give_up(self, step: int, index: int, why: str) -> None:
        raise RunError(f"pack {index} of step {step} can't be trained by all ranks of its group: {why}")

    def take_waited_s(self) -> float:
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def void(self, step: int) -> dict[str, str]:
        return dict(self._void)

    def finish(self, step: int) -> None:
        self._void.clear()

    def _step(self, step: int) -> RecordedStep:
        wanted = self._plan.recorded(step) if self._plan else step
        if self._open is None or self._open.step != wanted:
            if self._open is not None:
                self._open.close()
            self._open = RecordedStep(self._recordings, wanted)
            if not self._open.whole:
                raise RunError(f"{self._open.path}: the step was not recorded, or not by all ranks")
        return self._open


def join(parts: Sequence[RecordedPack], had: PartOf) -> dict[str, Tensor]:
    """``aux`` and ``last`` of a whole pack, out of the parts of the ranks that trained it together, in their order."""
    first = parts[0]
    rows = [had(first.tensors["loss_mask"], first.lengths, Share(rank, len(parts))) for rank in range(len(parts))]
    joined = {}
    for name in ("aux", "last"):
        count = 1 + max(int(row[name].max()) if len(row[name]) else -1 for row in rows)
        whole = first.tensors[name].new_empty(count, *first.tensors[name].shape[1:])
        for part, row in zip(parts, rows, strict=True):
            whole[row[name]] = part.tensors[name]
        joined[name] = whole
    return joined


def divide(whole: Mapping[str, Tensor], pack: RecordedPack, has: PartOf, share: Share) -> dict[str, Tensor]:
    """The rows of each tensor that a share has."""
    if share.ranks == 1:
        return dict(whole)
    rows = has(pack.tensors["loss_mask"], pack.lengths, share)
    return {name: tensor[rows[name]] for name, tensor in whole.items()}


class Verdicts:
    """Says of each step whether it came out as it was recorded (`specbatch.training.sources.Observer`).

    Args:
        path: JSON lines; of rank 0 only, others write none.
    """

    def __init__(self, source: Recordings, path: Path | None) -> None:
        self._source, self._path = source, path
        self._packs: list[tuple[Pack, Tensor]] = []

    def start(self, trained: int) -> None:
        """Nothing to prepare."""

    def pack(self, pack: Pack, tensors: PackTensors, result: Tensor, void: dict[str, str]) -> None:
        self._packs.append((pack, result.cpu()))

    def step(self, line: dict[str, Any]) -> None:
        step = line["step"]
        packs, self._packs = self._packs, []
        if self._path is None:
            return
        recorded = self._source.line(step)
        different = [name for name in COMPARED if line[name] != recorded[name]]
        wrong = []
        for pack, result in packs:
            then = self._source.result(step, pack.id)
            if then is None or not torch.equal(result, then):
                wrong.append(f"{pack.epoch}.{pack.index}")
        verdict = {
            "step": step,
            "same": not different,
            "loss": line["loss"],
            "recorded": recorded["loss"],
            **_apart(line["loss"], recorded["loss"]),
            "different": different,
            "packs": wrong,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(verdict) + "\n")


def _apart(loss: float | None, recorded: float | None) -> dict[str, float | None]:
    """How far two losses are apart; nobody knows where one of them is no number."""
    if loss is None or recorded is None:
        return {"apart": None, "relative": None}
    return {"apart": abs(loss - recorded), "relative": abs(loss - recorded) / max(abs(recorded), math.ulp(0.0))}

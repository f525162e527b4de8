"""Replaces a live run by recorded steps: the source of packs, the conductor of steps, and the comparison of results."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbatch.dispatch.messages import Go, Phase
from specbatch.drafts.base import CaptureContract
from specbatch.drafts.masks import SampleId
from specbatch.drafts.pack import ContextShard, PackTensors
from specbatch.errors import RunError
from specbatch.pack_manifest import PackId
from specbatch.plan import Pack
from specbatch.recorded_plan import RecordedPlan
from specbatch.snapshot.recording import RecordedPack, RecordedStep
from specbatch.training.feed.buffers import ShareRows, empty_pack
from specbatch.training.feed.steps import Steps

COMPARED = ("loss", "losses", "accuracy", "grad_norm")
"""Metrics of a step that depend on its arithmetic."""


class Alone:
    """Lets every step up to the last one begin (`specbatch.training.protocols.Conductor`)."""

    def __init__(self, last_step: int) -> None:
        self._last_step = last_step

    def join(self, rank: int, world: int, segment: str, segment_bytes: int, step: int, generation: int = 0) -> None:
        """Do nothing: no rank waits for another."""

    def begin(self, rank: int, step: int) -> Go:
        if step > self._last_step:
            return Go(False, Phase.STOP, "all requested steps are trained")
        return Go(True, Phase.WORK)


class Recordings:
    """The packs of a rank, read from recordings (`specbatch.training.protocols.PackSource`). The parts of ranks that
    trained a pack together are joined, and divided again among the ranks that train it now.

    Args:
        recordings: folder of the recordings.
        steps: which packs this rank trains.
        plan: translates steps to recorded ones; None if they are the same.
        trained: is called with each finished step.
        share: which part of its packs this rank trains.
        had: the rows of each share when it was recorded.
        has: the rows of each share now.
    """

    def __init__(
        self,
        recordings: Path,
        steps: Steps,
        *,
        plan: RecordedPlan | None,
        trained: Callable[[int], object],
        share: ContextShard,
        had: ShareRows,
        has: ShareRows,
        contract: CaptureContract,
        device: torch.device,
    ) -> None:
        self._recordings, self._steps, self._plan, self._trained = recordings, steps, plan, trained
        self._share, self._had, self._has = share, had, has
        self._contract, self._device = contract, device
        self._open: RecordedStep | None = None
        self._void: dict[str, str] = {}
        self._waited_s = 0.0

    def start(self, trained: int) -> None:
        """Do nothing: packs are not fetched ahead."""

    def take(self, step: int, index: int) -> PackTensors:
        """Read a pack and check it.

        Raises:
            DamagedSnapshot: a recording is damaged; names file and dataset.
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
        lacking = self._contract.widths.keys() - tensors.keys()
        if lacking:
            raise RunError(
                f"{self._recordings}: step {step} was recorded without {', '.join(sorted(lacking))}, which this draft "
                "reads: it was recorded for another draft.algorithm"
            )
        moved = {name: tensors[name].to(self._device) for name in ("input_ids", *self._contract.widths)}
        ids = moved.pop("input_ids")
        return PackTensors(ids, tensors["loss_mask"], found.lengths, moved, _samples(found), self._share)

    def result(self, step: int, pack: PackId) -> Tensor | None:
        """Return the recorded result of this rank's part of a pack; None if packs were divided differently then. Raises
        the same as `take`."""
        together = self._step(step).together
        return self._recorded(step, pack, self._share.rank).result if together == self._share.ranks else None

    def _recorded(self, step: int, pack: PackId, share: int) -> RecordedPack:
        found = self._step(step).read(pack, share)
        if found is None:
            raise RunError(f"{self._recordings}: pack {pack[0]}.{pack[1]} of step {step} was not recorded")
        return found

    def line(self, step: int) -> dict[str, Any]:
        """Return the recorded metrics of a step."""
        return self._step(step).line

    def release(self, step: int, index: int) -> None:
        """Do nothing: the memory is freed with its last reference."""

    def give_up(self, step: int, index: int, why: str) -> None:
        raise RunError(f"pack {index} of step {step} can't be trained by all ranks of its group: {why}")

    def take_waited_s(self) -> float:
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def void(self, step: int) -> dict[str, str]:
        return dict(self._void)

    def finish(self, step: int) -> None:
        self._trained(step)
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


def join(parts: Sequence[RecordedPack], had: ShareRows) -> dict[str, Tensor]:
    """Return the captured tensors of a whole pack, joined from the parts of its ranks, in rank order."""
    first = parts[0]
    shares = [ContextShard(rank, len(parts)) for rank in range(len(parts))]
    rows = [had(first.tensors["loss_mask"], first.lengths, _samples(first), share) for share in shares]
    joined = {}
    for name in rows[0]:
        count = 1 + max(int(row[name].max()) if len(row[name]) else -1 for row in rows)
        whole = first.tensors[name].new_empty(count, *first.tensors[name].shape[1:])
        for part, row in zip(parts, rows, strict=True):
            whole[row[name]] = part.tensors[name]
        joined[name] = whole
    return joined


def divide(whole: Mapping[str, Tensor], pack: RecordedPack, has: ShareRows, share: ContextShard) -> dict[str, Tensor]:
    """Return the rows of each tensor that belong to a share."""
    if share.ranks == 1:
        return dict(whole)
    rows = has(pack.tensors["loss_mask"], pack.lengths, _samples(pack), share)
    return {name: tensor[rows[name]] for name, tensor in whole.items()}


def _samples(pack: RecordedPack) -> tuple[SampleId, ...]:
    return tuple(SampleId(pack.id[0], index) for index in pack.samples)


class Verdicts:
    """Reports for each step whether its result equals the recorded one (`specbatch.training.protocols.Observer`).

    Args:
        path: file of JSON lines; only rank 0 writes it.
    """

    def __init__(self, source: Recordings, path: Path | None) -> None:
        self._source, self._path = source, path
        self._packs: list[tuple[Pack, Tensor]] = []

    def start(self, trained: int) -> None:
        """Do nothing: there is nothing to prepare."""

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
    """Return the differences of two losses; None if one of them is not a number."""
    if loss is None or recorded is None:
        return {"apart": None, "relative": None}
    return {"apart": abs(loss - recorded), "relative": abs(loss - recorded) / max(abs(recorded), math.ulp(0.0))}

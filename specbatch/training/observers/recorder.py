"""Records the newest steps as they were trained. A thread writes; training waits only while it is a whole step behind,
so at most two steps' packs are held in memory."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbatch.drafts.pack import ContextShard, PackTensors
from specbatch.plan import Pack
from specbatch.snapshot.recording import RecordedPack, forget, write_rank

log = logging.getLogger(__name__)


class Recorder:
    """An observer that records (`specbatch.training.protocols.Observer`). A write error is reported and does not end
    the run.

    Args:
        keep: number of steps to keep.
        share: position of this rank among those that train a pack together.
        tell: is called with what can't be written and why, and with an empty reason when it can.
    """

    def __init__(
        self,
        recordings: Path,
        *,
        keep: int,
        rank: int,
        ranks: int,
        share: ContextShard,
        tell: Callable[[str, str], None],
    ) -> None:
        self._tell, self._failed = tell, False
        self._recordings, self._keep, self._rank, self._ranks, self._share = recordings, keep, rank, ranks, share
        self._packs: list[RecordedPack] = []
        self._steps: queue.Queue[tuple[list[RecordedPack], dict[str, Any]] | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self, trained: int) -> None:
        self._forget(after=trained)
        self._thread.start()

    def pack(self, pack: Pack, tensors: PackTensors, result: Tensor, void: dict[str, str]) -> None:
        read = {"input_ids": tensors.input_ids, "loss_mask": tensors.loss_mask, **tensors.rows}
        copies = {name: _copy(tensor) for name, tensor in read.items()}
        why = void.get(f"{pack.epoch}.{pack.index}", "")
        self._packs.append(RecordedPack(pack.id, pack.samples, tensors.lengths, why, copies, _copy(result)))

    def step(self, line: dict[str, Any]) -> None:
        if self._thread.is_alive():
            self._steps.put((self._packs, line))
        self._packs = []

    def close(self) -> None:
        """Wait until everything is written."""
        if self._thread.is_alive():
            self._steps.put(None)
            self._thread.join()

    def give_way(self) -> None:
        """Delete what this rank recorded, and record no more: the run's last snapshot needs the room."""
        self.close()
        self._forget(after=0)
        why = "deleted, since the last snapshot had no room"
        log.error("RECORDINGS DELETED path=%s why=%s", self._recordings, why)
        self._tell(f"recording of rank {self._rank}", why)

    def _run(self) -> None:
        while (recorded := self._steps.get()) is not None:
            packs, line = recorded
            self._record(packs, line)
            # Also after a failure: this may free the space that is lacking.
            self._forget(before=line["step"] - self._keep + 1)

    def _record(self, packs: list[RecordedPack], line: dict[str, Any]) -> None:
        step, what = line["step"], f"recording of rank {self._rank}"
        try:
            size = write_rank(
                self._recordings, step, packs, line, rank=self._rank, ranks=self._ranks, together=self._share.ranks
            )
        except Exception as error:  # any kind: training would wait forever for a dead thread
            log.error("RECORDING FAILED, training continues without step=%d why=%r", step, error)
            self._failed = True
            self._tell(what, f"step {step}: {error}")
            return
        if self._failed:
            self._failed = False
            self._tell(what, "")
        log.info("recorded step=%d bytes=%d", step, size)

    def _forget(self, *, before: int = 0, after: int | None = None) -> None:
        try:
            forget(self._recordings, self._rank, self._ranks, before=before, after=after)
        except OSError as error:
            log.error("old recordings can't be deleted path=%s why=%s", self._recordings, error)


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor)

"""torchtitan's checkpoint manager, storing HDF5 snapshots that a run can rely on.

How the trainer uses it:

- Configuration: ``checkpoint=HDF5CheckpointManager.Config(enable=True, interval=steps, keep=config.snapshot.keep,
  facts=facts)`` in torchtitan's ``Trainer.Config``, whose ``dump_folder`` is the run
  directory. ``facts`` is JSON that must be the same when training continues, as
  ``{"plan": plan.fingerprint, "draft": {...}, "optimizer": {...}}``; nested as deep as is useful, since an error
  names the leaves that differ. All else (asynchronous saves, the folder ``snapshots``, whole last saves) is set.
- ``trainer.checkpointer.load()`` (torchtitan's ``train()`` calls it) restores the newest snapshot that can be read,
  and returns False where there is none yet. `UserError` for other facts or another model, `RunError` when there are
  snapshots and none can be read.
- ``trainer.checkpointer.save(step, last_step=True)`` ends a run or drains it: written before it returns, and not
  twice if the interval has just saved that step. `RunError` if even a second try with freed space fails.
  Every other save that fails is logged as an error, its folder is deleted, and training continues.
- ``trainer.checkpointer.saved_step`` is the newest step known to be on disk, the same on all ranks as long as they
  ask between the same two steps; None before the first.
- ``trainer.checkpointer.best``, if rank 0 sets it, returns which of some steps has the best draft: its snapshot is kept
  in addition to the newest ones.
- ``trainer.checkpointer.pace``, if it is set, takes the place of the interval in steps: a snapshot follows the step
  that ``trainer.checkpointer.wanted`` was set to, on all ranks alike.
- ``trainer.checkpointer.take_blocked_s()``: seconds that saves held the trainer up since it was last asked.
- ``trainer.checkpointer.tell``, if it is set, is called by rank 0 with ``snapshot`` and why one could not be written,
  and with an empty reason after each that was.
- ``trainer.checkpointer.make_room``, if it is set, is called by every rank where the last snapshot has no room, before
  it is tried once more.
- ``trainer.checkpointer.superseded``, if it is set, says whether a later attempt has begun: then nothing is written
  and nothing deleted any more, and a last save is a `RunError`.
- ``trainer.close()`` before ``destroy_process_group()``: it awaits a save under way. After an error don't close:
  end the process, and the save under way will never have a manifest.
- Of the random generators, torch's are kept for each rank (on the CPU, and the rank's own GPU).

Not run on a GPU yet: staging through pinned memory, and the GPU's random generator.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpointer import AsyncMode, CheckpointManager
from torchtitan.components.checkpointer.base import MODEL

from specbatch.errors import RunError, UserError
from specbatch.snapshot import manifest as snapshot_manifest
from specbatch.snapshot.interval import SnapshotInterval
from specbatch.snapshot.manifest import DamagedSnapshot, SnapshotManifest, read_manifest, snapshot_path
from specbatch.snapshot.storage import HDF5Reader, HDF5Writer

logger = logging.getLogger(__name__)

RANDOM = "random"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RandomState(Stateful):
    """torch's random generators of one rank; other ranks keep theirs under other names."""

    def __init__(self, rank: int) -> None:
        self.rank = f"rank-{rank}"

    def state_dict(self) -> dict[str, Any]:
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        return {self.rank: states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict[self.rank]
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])

    def names(self) -> list[str]:
        """Names of its tensors in a snapshot."""
        return [f"{RANDOM}.{self.rank}.{device}" for device in self.state_dict()[self.rank]]


class HDF5CheckpointManager(CheckpointManager):
    """The checkpoint manager of a rank; all ranks call the same methods at the same steps."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        folder: str = "snapshots"
        """Below the trainer's dump folder."""
        async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "async"
        """How snapshots are written: in a thread, or synchronously."""
        last_save_model_only: bool = False
        initial_load_model_only: bool = False
        keep_latest_k: int = 0
        """torchtitan's own pruning, which counts broken snapshots too, stays off."""
        keep: int = 2
        """Number of complete snapshots that are kept."""
        facts: dict[str, Any] = field(default_factory=dict)
        """JSON; a snapshot with other facts is refused."""

        def __post_init__(self) -> None:
            CheckpointManager.Config.__post_init__(self)
            if self.async_mode == "async_with_pinned_mem" or self.keep_latest_k or self.last_save_model_only:
                raise ValueError("snapshots are whole, written by a thread or synchronously, and pruned by `keep`")
            if self.keep < 1:
                raise ValueError(f"keep is {self.keep}: at least one snapshot has to be kept")

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.saved_step: int | None = None
        self.best: snapshot_manifest.Best | None = None
        self.superseded: Callable[[], bool] = lambda: False
        self.pace: SnapshotInterval | None = None
        self.wanted: int | None = None
        self.tell: Callable[[str, str], None] | None = None
        self.make_room: Callable[[], None] | None = None
        self._no_room = False
        """Whether that is why the last save failed."""
        self._blocked_s = 0.0
        if not self.enable:
            return
        self.path = Path(self.folder)
        self.keep, self.facts = config.keep, config.facts
        self.rank = dist.get_rank()
        self.random = RandomState(self.rank)
        self.states[RANDOM] = self.random
        self._pruning = threading.Lock()
        gpu = torch.cuda.is_available()
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
            )
        )

    def take_blocked_s(self) -> float:
        """Seconds that `save` held the trainer up since this was last asked."""
        blocked_s, self._blocked_s = self._blocked_s, 0.0
        return blocked_s

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        if self.pace is None or last_step:
            return bool(super()._should_save(curr_step, last_step))
        return not self.load_only and curr_step == self.wanted

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        began = time.monotonic()
        try:
            return self._save_if_due(curr_step, last_step)
        finally:
            if self._should_save(curr_step, last_step):
                self._blocked_s += time.monotonic() - began

    def _save_if_due(self, curr_step: int, last_step: bool) -> bool:
        if last_step:
            self.maybe_wait_for_saving()
        if curr_step == self.saved_step:
            return False
        saving = super()._save(curr_step, last_step)
        if last_step and saving and self.saved_step != curr_step:
            self._prune(keep=1)
            if self._no_room and self.make_room is not None:
                self.make_room()
            super()._save(curr_step, last_step=True)
            if self.saved_step != curr_step:
                raise RunError(
                    f"the last snapshot, of step {curr_step}, could not be written to {self.path}; "
                    f"the newest whole one is of step {self.saved_step}: make room and resume"
                )
        return saving

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Future[None] | None:
        """Write a snapshot, or have a thread write it. A failure is reported, not raised."""
        step, began = int(Path(checkpoint_id).name.removeprefix("step-")), time.monotonic()
        if self.pace is not None:
            self.pace.begun(began)
        writer = HDF5Writer(Path(checkpoint_id), step=step, facts=self.facts, superseded=self.superseded)
        if async_mode == AsyncMode.DISABLED:
            failure = None
            try:
                dcp.save(state_dict, storage_writer=writer, process_group=self.pg)
            except CheckpointException as error:
                failure = error
            self._settle(step, began, failure, time.monotonic() - began)
            return None
        writing = dcp.async_save(state_dict, storage_writer=writer, process_group=self.pg, async_stager=self.stager)
        staged_s = time.monotonic() - began
        logger.info("snapshot staged step=%d seconds=%.3f", step, staged_s)
        outcome: Future[None] = Future()

        def settle(done: Future[Any]) -> None:
            try:
                failure = done.exception()
                if failure is not None and not isinstance(failure, CheckpointException):
                    raise failure
                self._settle(step, began, failure, staged_s)
                outcome.set_result(None)
            except BaseException as error:  # kept for the rank's main thread, which awaits it
                outcome.set_exception(error)

        assert isinstance(writing, Future), "the stager blocks until it has copied"
        writing.add_done_callback(settle)
        return outcome

    def _settle(self, step: int, began: float, failure: CheckpointException | None, blocked_s: float) -> None:
        """Say how a save ended, and keep the folder in order. Runs on every rank, in whichever thread wrote.

        Args:
            blocked_s: how long training stood still.
        """
        self._no_room = failure is not None and _lacks_room(failure)
        if failure is None:
            self.saved_step = step
        if self.rank:
            return
        snapshot, seconds = snapshot_path(self.path, step), time.monotonic() - began
        if failure is None:
            size = sum(read_manifest(snapshot).files.values())
            logger.info("snapshot written step=%d bytes=%d seconds=%.2f blocked_s=%.3f", step, size, seconds, blocked_s)
            if self.pace is not None:
                self.pace.measured(blocked_s, seconds)
                logger.info("next snapshot seconds=%.0f", self.pace.interval_s)
            self._tell("")
            self._prune(self.keep)
            return
        self._tell(f"step {step}: {_reason(failure)}; the newest one on disk is of step {self.saved_step}")
        logger.error(
            "SNAPSHOT FAILED, training continues and the one before stays step=%d kept=%s path=%s why=%s",
            step,
            self.saved_step,
            snapshot,
            _reason(failure),
        )
        if self.superseded():
            return
        try:
            snapshot_manifest.remove(snapshot)
        except OSError as error:
            logger.error("a half-written snapshot can't be deleted path=%s why=%s", snapshot, error)

    def _tell(self, why: str) -> None:
        """Report, for people, that snapshots can't be written, or that they can be again."""
        if self.tell is not None:
            self.tell("snapshot", why)

    def _prune(self, keep: int) -> None:
        """Delete all but the newest whole snapshots and the best, and those that were refused before them."""
        if self.rank or self.superseded():
            return
        with self._pruning:
            for path in snapshot_manifest.superfluous(self.path, keep, self.best):
                try:
                    snapshot_manifest.remove(path)
                except OSError as error:
                    logger.error("an old snapshot can't be deleted path=%s why=%s", path, error)

    def _load(self, step: int = -1) -> bool:
        """Load the newest snapshot that can be read, or exactly that of ``step``."""
        steps = self._first_rank(lambda: self._tidy() if step == -1 else [step])
        refused: list[Path] = []
        for candidate in reversed(steps):
            snapshot = snapshot_path(self.path, candidate)
            try:
                manifest = self._first_rank(lambda path=snapshot: _manifest_or_damage(path))
                if isinstance(manifest, DamagedSnapshot):
                    raise manifest
                self._check_facts(snapshot, manifest)
                self._manifest = manifest
                super()._load(candidate)
            except DamagedSnapshot as error:
                logger.error("snapshot refused step=%d why=%s", candidate, error)
                refused.append(snapshot)
                continue
            if self.rank == 0:
                for path in refused:
                    snapshot_manifest.set_aside(path)
            self.saved_step = candidate
            return True
        if steps:
            raise RunError(
                f"none of the snapshots in {self.path} can be read (steps {', '.join(map(str, steps))}; the log says "
                "why); delete that folder to start from the beginning"
            )
        return False

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Fill the state from a snapshot whose manifest was read already."""
        snapshot, manifest = Path(checkpoint_id), self._manifest
        if not set(self.random.names()) <= set(manifest.tensors):
            logger.warning(
                "random generators are seeded again: the snapshot had %d ranks rank=%d", manifest.ranks, self.rank
            )
            del state_dict[RANDOM]
        try:
            dcp.load(state_dict, storage_reader=HDF5Reader(snapshot, manifest), process_group=self.pg)
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            damage = next((cause for cause in causes if isinstance(cause, DamagedSnapshot)), None)
            if damage is not None:
                raise damage from None
            raise UserError(f"{snapshot} does not fit this draft model: {_reason(error)}") from error
        self.states[MODEL].load_state_dict(state_dict)

    def _check_facts(self, snapshot: Path, manifest: SnapshotManifest) -> None:
        changed = snapshot_manifest.differences(manifest.facts, self.facts)
        if changed:
            raise UserError(
                f"{snapshot} belongs to another training: {'; '.join(changed)}. "
                "Restore these to continue, or use another run.dir for a new run"
            )

    def _tidy(self) -> list[int]:
        """Delete the remains of interrupted saves. Returns the steps of all snapshots, ascending."""
        for path in snapshot_manifest.half_written(self.path):
            logger.warning("deleting a half-written snapshot path=%s", path)
            snapshot_manifest.remove(path)
        return snapshot_manifest.snapshots(self.path)

    def _first_rank(self, ask: Any) -> Any:
        """The result of rank 0 on every rank: a shared file system may show each of them another state."""
        answer = [ask() if self.rank == 0 else None]
        dist.broadcast_object_list(answer, src=0, group=self.pg)
        return answer[0]

    def _close(self) -> None:
        self.maybe_wait_for_saving()
        super()._close()


def _manifest_or_damage(snapshot: Path) -> SnapshotManifest | DamagedSnapshot:
    try:
        return read_manifest(snapshot)
    except DamagedSnapshot as error:
        return error


def _lacks_room(failure: CheckpointException) -> bool:
    """Whether any rank's disk is full."""
    return any(isinstance(error, OSError) and error.errno in NO_ROOM for error, _ in failure.failures.values())


def _reason(failure: CheckpointException) -> str:
    """The errors of all ranks, each once, without their tracebacks."""
    return "; ".join(dict.fromkeys(f"{type(e).__name__}: {e}" for e, _ in failure.failures.values()))

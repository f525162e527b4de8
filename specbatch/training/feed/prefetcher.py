"""Fetches the packs of this rank in a thread, ahead of training, so that training never waits for stored packs.

The thread follows the plan. It asks the dispatcher where the next packs are, fetches their rows into registered memory,
verifies them, and reports lost ones to be computed again. Training takes packs in the plan's order, in whatever order
they arrive.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import ConnectionFile
from specbatch.drafts.base import CaptureContract
from specbatch.drafts.pack import ContextShard, PackTensors
from specbatch.pack_manifest import Manifest, missing
from specbatch.plan import Pack
from specbatch.training.feed.buffers import Buffer, PackRows, Part, ShareRows, empty_pack, make_buffers, only
from specbatch.training.feed.device_copy import Upload
from specbatch.training.feed.steps import Steps
from specbatch.transfer.pack_reader import PackLost, read_pack, remove_pack
from specbatch.transfer.store import StoreClient

if TYPE_CHECKING:
    from specbatch.corpus import Corpus

log = logging.getLogger(__name__)


@dataclass
class _Held:
    """A pack from when it may be fetched to the end of its step."""

    step: int
    pack: Pack
    rows: PackRows
    ready: bool = False
    void: str = ""
    manifest: Manifest | None = None
    buffer: Buffer | None = None
    upload: Upload | None = None


class Prefetcher:
    """Fetch the packs of one rank.

    Args:
        contract: which rows a pack has.
        tokens_per_pack: most tokens of a pack.
        ahead: steps whose packs are fetched while another is trained.
        last_step: step after which nothing is fetched.
        device: where packs are trained.
        share: which part of its packs this rank trains.
        part: returns the rows of each tensor that a share of a pack needs; None means all.
    """

    def __init__(
        self,
        client: Client,
        store: StoreClient,
        rendezvous: ConnectionFile,
        *,
        rank: int,
        steps: Steps,
        corpus: Corpus,
        contract: CaptureContract,
        tokens_per_pack: int,
        ahead: int,
        last_step: int,
        device: torch.device,
        share: ContextShard,
        part: ShareRows | None,
    ) -> None:
        self._share, self._part = share, part
        self._client, self._store, self._rendezvous = client, store, rendezvous
        self._rank, self._steps, self._corpus, self._contract = rank, steps, corpus, contract
        self._ahead, self._last_step, self._device = ahead, last_step, device
        on_host = device.type == "cpu"
        self._stream = None if on_host else torch.Stream(device)
        count = steps.packs_per_rank * (ahead + 1)
        self._memory, self._free = make_buffers(count, tokens_per_pack, contract.widths, pinned=not on_host)
        store.register(self._memory.data_ptr(), self._memory.nbytes)
        self._changed = threading.Condition()
        self._held: dict[int, list[_Held]] = {}
        self._next = 0
        self._error: Exception | None = None
        self._waited_s = 0.0

    def start(self, trained: int) -> None:
        """Start fetching the packs that follow the given number of trained steps."""
        self._next = trained + 1
        self._extend(trained)
        threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def take(self, step: int, index: int) -> PackTensors:
        """Return this rank's pack of a step, on the device; waits until it is there.

        Raises:
            RunError: the pack can't be provided.
        """
        begun = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._error or (step in self._held and self._held[step][index].ready))
            if self._error is not None:
                raise self._error
            held = self._held[step][index]
        self._waited_s += time.perf_counter() - begun
        tensors = self._tensors(held)
        following = self._after(step, index)
        if self._stream is not None and following is not None and following.ready:
            self._start_upload(following)
        return tensors

    def release(self, step: int, index: int) -> None:
        """Mark a pack as trained, so that its memory can be reused."""
        with self._changed:
            held = self._held[step][index]
            held.upload = None
            if held.buffer is not None:
                self._free.append(held.buffer)
                held.buffer = None
            self._changed.notify_all()

    def take_waited_s(self) -> float:
        """Return the seconds that `take` waited for data since the last call of this method."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def give_up(self, step: int, index: int, why: str) -> None:
        """Train a pack as zero although it is here, since another rank of its group can't get its part."""
        with self._changed:
            held = self._held[step][index]
            held.void = why
        log.warning("void pack=%d.%d why=%s", held.pack.epoch, held.pack.index, why)

    def void(self, step: int) -> dict[str, str]:
        """Return this rank's packs of a step that train as zero, and why."""
        return {f"{held.pack.epoch}.{held.pack.index}": held.void for held in self._held[step] if held.void}

    def finish(self, step: int) -> None:
        """Mark a step as trained: remove its packs from the store, tell the dispatcher, and look further ahead."""
        for held in self._held[step]:
            if held.manifest is not None:
                remove_pack(self._store, self._rendezvous.run, self._rendezvous.attempt, held.manifest)
        self._client.trained(self._rank, step)
        with self._changed:
            del self._held[step]
            self._changed.notify_all()

    def _tensors(self, held: _Held) -> PackTensors:
        if held.buffer is None or held.void:
            return empty_pack(self._contract, self._device)
        self._start_upload(held)
        assert held.upload is not None
        return held.upload.tensors()

    def _start_upload(self, held: _Held) -> None:
        if held.upload is None and held.buffer is not None:
            views = held.buffer.place(held.rows, self._contract.widths)[1]
            own = only(views, self._part_of(held.rows))
            held.upload = Upload(held.rows, self._share, own, held.buffer, self._device, self._stream)

    def _part_of(self, rows: PackRows) -> Part | None:
        """Return the rows of this rank's share of a pack; None means all."""
        if self._part is None:
            return None
        return self._part(torch.from_numpy(rows.loss_mask), rows.lengths, rows.samples, self._share)

    def _after(self, step: int, index: int) -> _Held | None:
        with self._changed:
            rest = self._held[step][index + 1 :] or self._held.get(step + 1, [])
            return rest[0] if rest else None

    # The thread

    def _run(self) -> None:
        try:
            while True:
                self._fetch(self._wanted())
        except Exception as error:
            log.exception("fetching ended")
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wanted(self) -> list[_Held]:
        """Return the packs to ask for, in the plan's order; waits until there are any."""
        while True:
            with self._changed:
                wanted = [held for step in sorted(self._held) for held in self._held[step] if not held.ready]
                if wanted:
                    return wanted
                trained = min(self._held, default=self._next) - 1
                if self._next > min(trained + 1 + self._ahead, self._last_step):
                    self._changed.wait()
                    continue
            self._extend(trained)

    def _extend(self, trained: int) -> None:
        """Add the packs of all steps that may be fetched once the given number of steps is trained."""
        while self._next <= min(trained + 1 + self._ahead, self._last_step):
            step = self._next
            held = [
                _Held(step, pack, PackRows.of(pack, self._corpus, self._contract), ready=not pack.samples)
                for pack in self._steps.facts(step).packs
            ]
            with self._changed:
                self._held[step] = held
                self._next += 1
                self._changed.notify_all()

    def _fetch(self, wanted: list[_Held]) -> None:
        by_id = {held.pack.id: held for held in wanted}
        reply = self._client.wait(self._rank, list(by_id))
        for pack, why in reply.void:
            log.warning("void pack=%s.%s why=%s", *pack, why)
            self._settle(by_id[pack], void=why)
        for manifest in sorted(reply.stored, key=lambda found: list(by_id).index(found.pack)):
            held = by_id[manifest.pack]
            try:
                self._get(held, manifest)
            except PackLost as lost:
                log.warning("lost pack=%s.%s claim=%d why=%s", *manifest.pack, manifest.claim, lost)
                self._client.lost(self._rank, manifest.pack, manifest.claim, str(lost))

    def _get(self, held: _Held, manifest: Manifest) -> None:
        if not held.rows.rows:
            self._settle(held, manifest=manifest)
            return
        with self._changed:
            buffer = self._free.pop()
        if buffer.uploaded is not None:
            buffer.uploaded.synchronize()
        try:
            part = self._part_of(held.rows)
            read_into(buffer, held.rows, manifest, self._store, self._rendezvous, self._contract, part)
        except PackLost:
            with self._changed:
                self._free.append(buffer)
            raise
        self._settle(held, manifest=manifest, buffer=buffer)

    def _settle(
        self, held: _Held, *, void: str = "", manifest: Manifest | None = None, buffer: Buffer | None = None
    ) -> None:
        with self._changed:
            held.void, held.manifest, held.buffer, held.ready = void, manifest, buffer, True
            self._changed.notify_all()


def read_into(
    buffer: Buffer,
    rows: PackRows,
    manifest: Manifest,
    store: StoreClient,
    rendezvous: ConnectionFile,
    contract: CaptureContract,
    part: Part | None = None,
) -> dict[str, torch.Tensor]:
    """Get a pack from the store, and verify that it is complete and unchanged since it was stored.

    Args:
        part: the rows that are read; objects without any of them are not fetched.

    Returns:
        bfloat16 ``[rows, width]`` of each tensor, in the buffer.

    Raises:
        Lost: it is incomplete or changed.
    """
    lacking = missing(manifest, rows.rows, contract.widths)
    if lacking is not None:
        raise PackLost(lacking)
    where, views = buffer.place(rows, contract.widths, part)
    read_pack(
        store, rendezvous.run, rendezvous.attempt, manifest, where,
        widths=contract.widths, seed=rendezvous.checksum_seed,
    )  # fmt: skip
    return views

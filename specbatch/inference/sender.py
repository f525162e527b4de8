"""Puts captured rows from host memory into the store, in a thread of SGLang's scheduler process, and reports.

Pieces are put in the order in which they were sent. When the store has no room the thread waits, and with it the ring;
rows that wait longer than the settings allow are reported as not captured.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass, field

import msgspec
import torch
import zmq

from specbatch.dispatch.messages import Fault
from specbatch.inference.orders import PROBE, Captured, NotCaptured, Order, Result, Settings
from specbatch.inference.ring import Ring
from specbatch.manifest import Chunk, Manifest, object_key
from specbatch.transfer.store import StoreClient, StoreError, StoreFull, checksum

logger = logging.getLogger(__name__)


@dataclass
class Piece:
    """The rows that one prefill chunk gave of one sample."""

    order: Order
    first: int
    """Position of the chunk's first token."""
    tokens: int
    rows: dict[str, int]
    """Rows of each tensor, in the order in which they lie in memory."""
    bytes: int
    offset: int | None = None
    """Where they lie in the sender's memory."""
    why_not: str | None = None
    """Why they may not be stored, or were not."""
    fault: Fault = Fault.PACK
    sent_s: float = 0.0


@dataclass
class _Sample:
    """How far an order has come."""

    tokens: int = 0
    chunks: list[Chunk] = field(default_factory=list)


class Sender:
    """The thread, its ring and the memory of it.

    Args:
        run: first part of the store's keys.
        memory: uint8 ``[bytes]`` on the host, registered with the store; pinned where there is a GPU.
    """

    def __init__(self, settings: Settings, run: str, seed: int, store: StoreClient, memory: torch.Tensor) -> None:
        self.settings, self.run, self.seed, self.store, self.memory = settings, run, seed, store, memory
        self.ring = Ring(memory.numel())
        self._queue: queue.SimpleQueue[list[Piece]] = queue.SimpleQueue()
        self._samples: dict[tuple[int, int], _Sample] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="specbatch-sender", daemon=True)
        self._thread.start()

    def send(self, pieces: list[Piece]) -> None:
        """Hand pieces over; returns at once. Raises what `check` raises."""
        self.check()
        if pieces:
            now = time.monotonic()
            for piece in pieces:
                piece.sent_s = now
            self._queue.put(pieces)

    def check(self) -> None:
        """See that the thread lives.

        Raises:
            RuntimeError: if it ended, which it never does of itself.
        """
        if self._failure is not None:
            raise RuntimeError("specbatch: nothing can be stored any more") from self._failure

    def _run(self) -> None:
        try:
            with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
                socket.linger = 0
                socket.connect(self.settings.results)
                while True:
                    for result in self._store(self._queue.get()):
                        socket.send(msgspec.msgpack.encode(result))
        except BaseException as error:
            logger.exception("specbatch: the thread that stores hidden states ended")
            self._failure = error

    def _store(self, pieces: list[Piece]) -> list[Result]:
        """Put pieces into the store and say what became of the samples that are settled by them."""
        for segment in dict.fromkeys(piece.order.segment for piece in pieces):
            self._put([piece for piece in pieces if piece.order.segment == segment], segment)
        results = [result for piece in pieces if (result := self._settle(piece)) is not None]
        for piece in pieces:
            if piece.offset is not None:
                self.ring.give_back()
        return results

    def _put(self, pieces: list[Piece], segment: str) -> None:
        """Put what may be stored; what fails gets its ``why_not``."""
        objects = [
            (piece, chunk, pointer)
            for piece in pieces
            if piece.why_not is None and piece.order.claim != PROBE
            for chunk, pointer in self._objects(piece)
        ]
        if not objects:
            return
        keys = [
            object_key(self.run, self.settings.attempt, Manifest(piece.order.claim, piece.order.pack, ()), chunk)
            for piece, chunk, _ in objects
        ]
        waited_s = time.monotonic() - pieces[0].sent_s
        try:
            self.store.put(
                keys,
                [pointer for *_, pointer in objects],
                [chunk.bytes for _, chunk, _ in objects],
                segment=segment,
                wait_s=max(0.0, self.settings.put_timeout_s - waited_s),
            )
        except StoreFull as error:
            for (piece, *_), stored in zip(objects, error.stored, strict=True):
                if not stored:
                    piece.why_not = f"no room in the store for {self.settings.put_timeout_s:g} s"
                    piece.fault = Fault.FULL
        except StoreError as error:
            for piece, *_ in objects:
                piece.why_not, piece.fault = f"the store: {error}", Fault.OTHER

    def _objects(self, piece: Piece) -> list[tuple[Chunk, int]]:
        """The chunks of a piece and their addresses; noted for the sample's result."""
        sample = self._samples.setdefault((piece.order.claim, piece.order.sample), _Sample())
        found: list[tuple[Chunk, int]] = []
        offset = piece.offset or 0
        for name, rows in piece.rows.items():
            if rows:
                nbytes = 2 * rows * self.settings.widths[name]
                total = checksum(self.memory[offset : offset + nbytes], self.seed)
                chunk = Chunk(piece.order.sample, name, piece.first, rows, nbytes, total)
                sample.chunks.append(chunk)
                found.append((chunk, self.memory.data_ptr() + offset))
                offset += nbytes
        return found

    def _settle(self, piece: Piece) -> Result | None:
        """What to say after a piece; None while more of its sample is to come."""
        key = piece.order.claim, piece.order.sample
        sample = self._samples.setdefault(key, _Sample())
        why_not = piece.why_not
        if why_not is None and piece.first != sample.tokens:
            why_not = f"its prefill went on at token {piece.first}, not {sample.tokens}"
        if why_not is not None:
            del self._samples[key]
            return NotCaptured(*key, why_not, piece.fault)
        sample.tokens += piece.tokens
        if sample.tokens < piece.order.tokens:
            return None
        del self._samples[key]
        return Captured(*key, tuple(sample.chunks))

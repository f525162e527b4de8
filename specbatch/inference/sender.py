"""Puts captured rows from host memory into the store, in a thread of SGLang's scheduler process, and reports.

Pieces are put in the order in which they were sent, large ones by several threads at once: over TCP one alone carries
about 1 GB/s, which is what a fast engine gives. When the store has no room the thread waits, and with it the ring;
rows that wait longer than the settings allow are reported as not captured.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec
import torch
import zmq

from specbatch.dispatch.messages import Fault
from specbatch.inference.capture_request import PROBE, Captured, CaptureRequest, CaptureSettings, NotCaptured, Result
from specbatch.inference.ring_buffer import RingBuffer
from specbatch.pack_manifest import Chunk, Manifest, object_key
from specbatch.transfer.memory import checksum
from specbatch.transfer.store import StoreClient, StoreError, StoreFull

logger = logging.getLogger(__name__)

PUT_THREADS = 4
SHARE_BYTES = 16 << 20
"""Fewest bytes for which another thread is worthwhile."""


@dataclass
class ChunkRows:
    """The rows of one sample that one prefill chunk produced."""

    request: CaptureRequest
    first: int
    """Position of the chunk's first token."""
    tokens: int
    rows: dict[str, int]
    """Number of rows of each tensor, in the order in memory."""
    bytes: int
    offset: int | None = None
    """Offset of the rows in the sender's memory."""
    why_not: str | None = None
    """Why the rows may not be stored, or were not."""
    fault: Fault = Fault.PACK
    final: bool = False
    """The same as `NotCaptured.final`."""
    sent_s: float = 0.0


@dataclass
class _Sample:
    """Progress of a capture request."""

    tokens: int = 0
    chunks: list[Chunk] = field(default_factory=list)


class Sender:
    """The sending thread, its ring and the ring's memory.

    Args:
        run: first part of the store's keys.
        memory: uint8 ``[bytes]`` on the host, registered with the store; pinned if there is a GPU.
    """

    def __init__(
        self, settings: CaptureSettings, run: str, seed: int, store: StoreClient, memory: torch.Tensor
    ) -> None:
        self.settings, self.run, self.seed, self.store, self.memory = settings, run, seed, store, memory
        self.ring = RingBuffer(memory.numel())
        self._queue: queue.SimpleQueue[list[ChunkRows]] = queue.SimpleQueue()
        self._samples: dict[tuple[int, int], _Sample] = {}
        self._failure: BaseException | None = None
        self._puts = ThreadPoolExecutor(PUT_THREADS, thread_name_prefix="specbatch-put")
        self._thread = threading.Thread(target=self._run, name="specbatch-sender", daemon=True)
        self._thread.start()

    def send(self, pieces: list[ChunkRows]) -> None:
        """Pass pieces to the thread; return at once. Raises the same as `check`."""
        self.check()
        if pieces:
            now = time.monotonic()
            for piece in pieces:
                piece.sent_s = now
            self._queue.put(pieces)

    def check(self) -> None:
        """Check that the thread is alive.

        Raises:
            RuntimeError: it ended, which happens only by an error.
        """
        if self._failure is not None:
            raise RuntimeError("specbatch: hidden states can no longer be stored") from self._failure

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

    def _store(self, pieces: list[ChunkRows]) -> list[Result]:
        """Put pieces into the store; return the results of the samples that they complete."""
        for segment in dict.fromkeys(piece.request.segment for piece in pieces):
            self._put([piece for piece in pieces if piece.request.segment == segment], segment)
        results = [result for piece in pieces if (result := self._settle(piece)) is not None]
        for piece in pieces:
            if piece.offset is not None:
                self.ring.give_back()
        return results

    def _put(self, pieces: list[ChunkRows], segment: str) -> None:
        """Put pieces that may be stored; set ``why_not`` of those that fail."""
        wanted = [piece for piece in pieces if piece.why_not is None and piece.request.claim != PROBE]
        objects = [found for part in self._puts.map(self._objects, wanted) for found in part]
        waited_s = time.monotonic() - pieces[0].sent_s if objects else 0.0
        wait_s = max(0.0, self.settings.put_timeout_s - waited_s)
        list(self._puts.map(lambda part: self._put_part(part, segment, wait_s), shares(objects)))

    def _put_part(self, objects: list[Located], segment: str, wait_s: float) -> None:
        keys = [
            object_key(self.run, self.settings.attempt, Manifest(piece.request.claim, piece.request.pack, ()), chunk)
            for piece, chunk, _ in objects
        ]
        try:
            self.store.put(
                keys,
                [pointer for *_, pointer in objects],
                [chunk.bytes for _, chunk, _ in objects],
                segment=segment,
                wait_s=wait_s,
            )
        except StoreFull as error:
            for (piece, *_), stored in zip(objects, error.stored, strict=True):
                if not stored:
                    piece.why_not = f"no room in the store for {self.settings.put_timeout_s:g} s"
                    piece.fault = Fault.FULL
        except StoreError as error:
            for piece, *_ in objects:
                piece.why_not, piece.fault = f"the store: {error}", Fault.OTHER

    def _objects(self, piece: ChunkRows) -> list[Located]:
        """Return the chunks of a piece with their addresses, and add them to the sample's result."""
        sample = self._samples.setdefault((piece.request.claim, piece.request.sample), _Sample())
        found: list[Located] = []
        offset = piece.offset or 0
        for name, rows in piece.rows.items():
            if rows:
                nbytes = 2 * rows * self.settings.widths[name]
                total = checksum(self.memory[offset : offset + nbytes], self.seed)
                chunk = Chunk(piece.request.sample, name, piece.first, rows, nbytes, total)
                sample.chunks.append(chunk)
                found.append((piece, chunk, self.memory.data_ptr() + offset))
                offset += nbytes
        return found

    def _settle(self, piece: ChunkRows) -> Result | None:
        """Return the result of a sample after a piece; None while more pieces follow."""
        key = piece.request.claim, piece.request.sample
        sample = self._samples.setdefault(key, _Sample())
        why_not = piece.why_not
        if why_not is None and piece.first != sample.tokens:
            why_not = f"its prefill continued at token {piece.first}, not {sample.tokens}"
        if why_not is not None:
            del self._samples[key]
            return NotCaptured(*key, why_not, piece.fault, piece.final)
        sample.tokens += piece.tokens
        if sample.tokens < piece.request.tokens:
            return None
        del self._samples[key]
        return Captured(*key, tuple(sample.chunks))


Located = tuple[ChunkRows, Chunk, int]
"""A piece, one of its chunks, and the address of its rows."""


def shares(objects: list[Located]) -> list[list[Located]]:
    """Divide objects, in order, into parts of about equal bytes, as many as threads are worthwhile."""
    total = sum(chunk.bytes for _, chunk, _ in objects)
    count = max(1, min(PUT_THREADS, total // SHARE_BYTES))
    parts: list[list[Located]] = [[] for _ in range(count)]
    before = 0
    for found in objects:
        parts[min(count - 1, before * count // max(total, 1))].append(found)
        before += found[1].bytes
    return [part for part in parts if part]

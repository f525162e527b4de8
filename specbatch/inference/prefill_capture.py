"""Moves hidden states from SGLang's scheduler process into the store while the next batch runs.

A prefill passes three stages:

1. `PrefillCapture.gather`, right after the forward and on its stream: copies the rows to capture, because SGLang's
   tensors may be views of buffers that the next forward overwrites. On a GPU nothing here waits for the device.
2. `PrefillRows`, which SGLang calls as one of its auxiliary outputs: copies the rows into registered host memory on
   SGLang's copy stream, and passes them on when that copy is done.
3. `specbatch.inference.sender`, a thread: puts them from there into the store and reports.

Host memory is a ring. Rows that do not fit stay on the device until it is their turn; then SGLang waits, and so a full
store slows an engine down.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from specbatch.drafts.base import BYTES_PER_VALUE
from specbatch.inference.capture_request import CAPTURE_REQUEST_KEY, CaptureRequest, Ranges, digest, rows_between
from specbatch.inference.sender import ChunkRows, Sender

logger = logging.getLogger(__name__)

ROOM_POLL_S = 1.0


class CaptureError(RuntimeError):
    """SGLang's tensors have an unexpected layout; continuing would store wrong rows."""


class PrefillCapture:
    """The capture of one engine; lives in the scheduler process of tensor-parallel rank 0.

    Args:
        widths: values per row of each tensor.
        sources: the same as `CaptureSettings.sources`.
        sender: owns the ring and its memory.
    """

    def __init__(self, widths: Mapping[str, int], sources: Mapping[str, Ranges | None], sender: Sender) -> None:
        self.widths, self.sources = dict(widths), dict(sources)
        self.sender = sender
        self._waiting = 0
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Return the number of pieces that found no room; later ones must not overtake them."""
        return self._waiting

    def count_waiting(self, change: int) -> None:
        """Change the number of waiting pieces; SGLang may copy in another thread."""
        with self._lock:
            self._waiting += change

    def gather(
        self, batch: Any, output: Any, problem: str | None = None, embeds: torch.Tensor | None = None
    ) -> PrefillRows | None:
        """Copy the rows of a prefill's capture requests, on the current stream.

        Args:
            batch: SGLang's ``ScheduleBatch``, in an extend mode.
            output: its ``LogitsProcessorOutput``: ``hidden_states`` ``[rows, aux]``, ``last_hidden_states``
                ``[rows, hidden]``.
            problem: why none of these rows may be stored.
            embeds: the embeddings that the first layer read, ``[rows, hidden]``, if a tensor consists of them.

        Returns:
            None if no request has a capture request.

        Raises:
            CaptureError: the tensors' shapes differ from those of batch and contract.
        """
        asked = [capture_request_of(request) for request in batch.reqs]
        if not any(asked):
            return None
        tensors = {name: self._tensor(name, output, embeds) for name in self.widths}
        lengths = [int(length) for length in batch.extend_lens]
        for name, width in self.widths.items():
            found = tuple(tensors[name].shape)
            if found != (sum(lengths), width):
                raise CaptureError(f"specbatch: {name} is {found}, not {(sum(lengths), width)}, for prefills {lengths}")
        pieces: list[ChunkRows] = []
        requests: list[Any] = []
        chosen: dict[str, list[np.ndarray]] = {name: [] for name in self.widths}
        start = 0
        for request, capture, first, length in zip(batch.reqs, asked, batch.prefix_lens, lengths, strict=True):
            if capture is not None:
                rows: dict[str, int] = {}
                for name in self.widths:
                    wanted = rows_between(capture.rows.get(name, ()), int(first), int(first) + length)
                    chosen[name].append(wanted + start)
                    rows[name] = len(wanted)
                pieces.append(ChunkRows(capture, int(first), length, rows, self._bytes(rows)))
                requests.append(request)
            start += length
        gathered = {name: _select(tensors[name], np.concatenate(chosen[name])) for name in self.widths}
        return PrefillRows(self, pieces, requests, gathered, problem)

    def _tensor(self, name: str, output: Any, embeds: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor of the contract for all rows of a prefill.

        Raises:
            CaptureError: SGLang has not kept it.
        """
        columns = self.sources[name]
        found: torch.Tensor | None = output.last_hidden_states if columns is None else output.hidden_states
        if columns == ():
            found = embeds
        if found is None:
            raise CaptureError(f"specbatch: SGLang has kept no states for {name}")
        if not columns or columns == ((0, found.shape[1]),):
            return found
        return torch.cat([found[:, first:end] for first, end in columns], 1)

    def _bytes(self, rows: Mapping[str, int]) -> int:
        return sum(count * self.widths[name] * BYTES_PER_VALUE for name, count in rows.items())


class PrefillRows:
    """The gathered rows of one prefill: both SGLang's ``DeviceAuxiliaryOutput`` and its ``HostAuxiliaryOutput``.

    Args:
        gathered: bfloat16 ``[rows, width]`` of each tensor, the pieces' rows concatenated.
        problem: why none of them may be stored.
    """

    def __init__(
        self,
        capture: PrefillCapture,
        pieces: list[ChunkRows],
        requests: list[Any],
        gathered: dict[str, torch.Tensor],
        problem: str | None = None,
    ) -> None:
        self.problem = problem
        self.capture, self.pieces, self.requests, self.gathered = capture, pieces, requests, gathered
        self.finite: dict[str, torch.Tensor] = {}
        self.starts: list[dict[str, int]] = []
        position = dict.fromkeys(gathered, 0)
        for piece in pieces:
            self.starts.append(dict(position))
            for name, count in piece.rows.items():
                position[name] += count

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> PrefillRows:
        """Called by SGLang on its copy stream after the forward; work that is queued here is done before `consume`."""
        for rows in self.gathered.values():
            if rows.device.type != "cpu":
                rows.record_stream(torch.accelerator.current_stream(rows.device))
        self.finite = {name: copy_tensor(torch.isfinite(rows).all(dim=1)) for name, rows in self.gathered.items()}
        for index, piece in enumerate(self.pieces):
            if piece.bytes and (self.capture.waiting or not self._copy(index, timeout_s=0.0)):
                self.capture.count_waiting(1)
        return self

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Called by SGLang when the prefill's results are committed, before it answers the requests."""
        ready: list[ChunkRows] = []
        for index, (piece, request) in enumerate(zip(self.pieces, self.requests, strict=True)):
            if piece.bytes and piece.offset is None:
                # Everything that was copied before has to be sent, otherwise no room is ever freed.
                self.capture.sender.send(ready)
                ready = []
                while not self._copy(index, timeout_s=ROOM_POLL_S):
                    self.capture.sender.check()
                self.capture.count_waiting(-1)
            piece.why_not = self.problem or self._why_not(index, request)
            ready.append(piece)
        self.capture.sender.send(ready)
        self.gathered = {}

    def _copy(self, index: int, timeout_s: float) -> bool:
        """Copy a piece into the ring, on the current stream. Return whether there was room for it."""
        piece = self.pieces[index]
        offset = self.capture.sender.ring.take(piece.bytes, timeout_s)
        if offset is None:
            return False
        piece.offset = offset
        for name, count in piece.rows.items():
            nbytes = count * self.capture.widths[name] * BYTES_PER_VALUE
            if nbytes:
                target = self.capture.sender.memory[offset : offset + nbytes].view(torch.bfloat16)
                first = self.starts[index][name]
                rows = self.gathered[name][first : first + count].reshape(-1)
                # Into pinned memory. When SGLang calls `consume`, what was queued before is done; a copy that had
                # to wait for room is made there, and waited for.
                target.copy_(rows, non_blocking=timeout_s == 0.0)
            offset += nbytes
        return True

    def _why_not(self, index: int, request: Any) -> str | None:
        """Return why a piece may not be stored; None if it may."""
        piece = self.pieces[index]
        ended = request.finished_reason or request.to_finish
        if ended is not None and ended.to_json()["type"] == "abort":
            return f"SGLang aborted it: {ended.to_json()['message']}"
        if request.is_retracted:
            return "SGLang put it back into its queue"
        if (why := other_tokens(request, piece.request)) is not None:
            piece.final = request.multimodal_inputs is not None
            return why
        for name, count in piece.rows.items():
            first = self.starts[index][name]
            if not bool(self.finite[name][first : first + count].all()):
                return f"not finite: NaN or Inf in {name} between tokens {piece.first} and {piece.first + piece.tokens}"
        return None


def capture_request_of(request: Any) -> CaptureRequest | None:
    """Return the capture request in a request; None for SGLang's own requests and other people's."""
    parameters = request.sampling_params.custom_params
    if not isinstance(parameters, dict) or CAPTURE_REQUEST_KEY not in parameters:
        return None
    return msgspec.convert(parameters[CAPTURE_REQUEST_KEY], CaptureRequest)


def other_tokens(request: Any, capture: CaptureRequest) -> str | None:
    """Return why a request's tokens are not those of its capture request; None if they are."""
    with_images = request.multimodal_inputs is not None
    # In the other ids, numbers stand for images in SGLang's cache.
    ids = request.origin_input_ids_unpadded if with_images else request.origin_input_ids
    if len(ids) == capture.tokens and digest(ids) == capture.digest:
        return None
    if not with_images:
        return "SGLang ran other tokens than those sent"
    return (
        f"SGLang makes {len(ids)} tokens of sample {capture.sample} and its images, and they are not the "
        f"{capture.tokens} that were prepared with the target's image processor: the engine has another version of "
        "transformers, or the target's processor files have changed; prepare the data with what the engine has"
    )


def _select(tensor: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    index = torch.from_numpy(rows)
    if tensor.device.type != "cpu":
        index = index.pin_memory().to(tensor.device, non_blocking=True)
    return tensor.index_select(0, index).to(torch.bfloat16)

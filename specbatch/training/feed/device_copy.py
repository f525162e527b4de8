"""Copies packs from registered host memory to the device on a separate stream, while the previous pack is trained.

The part with a stream never ran: the machines that this was made on have no GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specbatch.drafts.pack import ContextShard, PackTensors
from specbatch.training.feed.buffers import Buffer, PackRows, joined
from specbatch.training.feed.steps import Steps


class StepWeights:
    """Factors of the terms of a step's loss, on the device: sent once a step, asynchronously."""

    def __init__(self, steps: Steps, device: torch.device) -> None:
        self._steps, self._device = steps, device
        self._sent: tuple[int, Tensor] | None = None

    def of(self, step: int) -> Tensor:
        """float32 ``[T]``."""
        if self._sent is None or self._sent[0] != step:
            weights = torch.from_numpy(self._steps.facts(step).weights)
            self._sent = step, weights.to(self._device, non_blocking=True)
        return self._sent[1]


class Upload:
    """A pack that is being copied to the device; on a CPU there is nothing to copy.

    Args:
        share: which part of the pack is trained here.
        views: the needed rows of each tensor, as views into the buffer.
        stream: for the copies; None if the device is the host.
    """

    def __init__(
        self,
        rows: PackRows,
        share: ContextShard,
        views: dict[str, list[Tensor]],
        buffer: Buffer,
        device: torch.device,
        stream: torch.Stream | None,
    ) -> None:
        self._stream = stream
        if stream is None:
            self._tensors = rows.tensors({name: joined(parts) for name, parts in views.items()}, device, share)
            return
        with stream:
            copies = {
                name: joined([part.to(device, non_blocking=True) for part in parts]) for name, parts in views.items()
            }
            self._tensors = rows.tensors(copies, device, share)
        buffer.uploaded = torch.Event(device)
        buffer.uploaded.record(stream)

    def tensors(self) -> PackTensors:
        """Return the pack, for use by work that is queued on the current stream from now on."""
        if self._stream is not None:
            current = torch.accelerator.current_stream()
            current.wait_stream(self._stream)
            for tensor in (self._tensors.input_ids, *self._tensors.rows.values()):
                tensor.record_stream(current)
        return self._tensors

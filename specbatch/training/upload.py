"""Packs from registered host memory to the device, on a stream of their own, while the one before is trained.

The part with a stream never ran: the machines that this was made on have no GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specbatch.training.buffers import Buffer, PackRows, joined
from specbatch.training.drafts.pack import PackTensors, Share


class Upload:
    """A pack on its way to the device; on a CPU it is there already.

    Args:
        share: which part of the pack is trained here.
        views: the rows of each tensor that it needs, where they lie in the buffer.
        stream: where copies are queued; None where the device is the host.
    """

    def __init__(
        self,
        rows: PackRows,
        share: Share,
        views: dict[str, list[Tensor]],
        buffer: Buffer,
        device: torch.device,
        stream: torch.Stream | None,
    ) -> None:
        self._stream = stream
        if stream is None:
            self._tensors = rows.tensors(joined(views["aux"]), joined(views["last"]), device, share)
            return
        with stream:
            copies = {
                name: joined([part.to(device, non_blocking=True) for part in parts]) for name, parts in views.items()
            }
            self._tensors = rows.tensors(copies["aux"], copies["last"], device, share)
        buffer.uploaded = torch.Event(device)
        buffer.uploaded.record(stream)

    def tensors(self) -> PackTensors:
        """The pack, for the work that is queued on the current stream from now on."""
        if self._stream is not None:
            current = torch.accelerator.current_stream()
            current.wait_stream(self._stream)
            for tensor in (self._tensors.input_ids, self._tensors.aux, self._tensors.last):
                tensor.record_stream(current)
        return self._tensors

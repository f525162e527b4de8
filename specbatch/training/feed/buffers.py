"""Host memory that packs are fetched into: registered with the store once, and reused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specbatch.drafts.base import BYTES_PER_VALUE, CaptureContract
from specbatch.drafts.masks import SampleId
from specbatch.drafts.pack import WHOLE, ContextShard, PackTensors, runs
from specbatch.plan import Pack
from specbatch.transfer.pack_reader import Destination

if TYPE_CHECKING:
    from specbatch.corpus import Corpus

_ALIGN = 64

Part = dict[str, Tensor]
"""The rows of each tensor of a pack that a rank reads: int64, ascending."""

ShareRows = Callable[[Tensor, tuple[int, ...], tuple[SampleId, ...], ContextShard], Part]
"""`specbatch.drafts.Algorithm.share_rows`."""


@dataclass(frozen=True)
class PackRows:
    """The tokens of a pack, and the number of rows in the store of each tensor of each sample."""

    input_ids: np.ndarray
    """int64 ``[tokens]``."""
    loss_mask: np.ndarray
    """bool ``[tokens]``."""
    lengths: tuple[int, ...]
    rows: tuple[tuple[int, str, int], ...]
    """(sample, tensor, rows), grouped by tensor, samples in the pack's order; only entries that have rows."""
    samples: tuple[SampleId, ...]

    @classmethod
    def of(cls, pack: Pack, corpus: Corpus, contract: CaptureContract) -> PackRows:
        """Read a pack's samples from the corpus."""
        samples = [corpus.sample(index) for index in pack.samples]
        chosen = [contract.rows(sample.loss_mask) for sample in samples]
        rows = [
            (index, tensor, int(found[tensor].size))
            for tensor in contract.widths
            for index, found in zip(pack.samples, chosen, strict=True)
            if found[tensor].size
        ]
        return cls(
            np.concatenate([np.empty(0, np.int64), *(sample.input_ids for sample in samples)]).astype(np.int64),
            np.concatenate([np.empty(0, bool), *(sample.loss_mask for sample in samples)]).astype(bool),
            tuple(len(sample.input_ids) for sample in samples),
            tuple(rows),
            tuple(SampleId(pack.epoch, index) for index in pack.samples),
        )

    def count(self, tensor: str) -> int:
        """Return the rows of a tensor over all samples."""
        return sum(rows for _, name, rows in self.rows if name == tensor)

    def bytes(self, widths: dict[str, int]) -> int:
        """Return the bytes of memory that `Buffer.place` needs for these rows."""
        return sum(_aligned(BYTES_PER_VALUE * width * self.count(tensor)) for tensor, width in widths.items())

    def tensors(self, rows: dict[str, Tensor], device: torch.device, share: ContextShard = WHOLE) -> PackTensors:
        """Return the draft's input. The mask stays on the host, where it is read."""
        ids = torch.from_numpy(self.input_ids).to(device, non_blocking=True)
        return PackTensors(ids, torch.from_numpy(self.loss_mask), self.lengths, rows, self.samples, share)


def empty_pack(contract: CaptureContract, device: torch.device) -> PackTensors:
    """Return the draft's input for a pack that trains as zero: no samples, no rows."""
    empty = {
        name: torch.empty(0, width, dtype=torch.bfloat16, device=device) for name, width in contract.widths.items()
    }
    ids = torch.empty(0, dtype=torch.int64, device=device)
    return PackTensors(ids, torch.empty(0, dtype=torch.bool), (), empty)


class Buffer:
    """Memory for the rows of one pack at a time.

    Args:
        memory: uint8, one-dimensional, on the host.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.uploaded: torch.Event | None = None
        """Recorded once the contents of the memory have been copied to the device."""

    def place(
        self, rows: PackRows, widths: dict[str, int], part: Part | None = None
    ) -> tuple[list[Destination], dict[str, Tensor]]:
        """Lay a pack out.

        Args:
            part: rows of each tensor that are needed; all if not given.

        Returns:
            where each sample's rows go, and bfloat16 views ``[rows, width]`` of these places.
        """
        destinations: list[Destination] = []
        views: dict[str, Tensor] = {}
        at = 0
        for tensor, width in widths.items():
            total = rows.count(tensor)
            end = at + BYTES_PER_VALUE * width * total
            views[tensor] = self.memory[at:end].view(torch.bfloat16).view(total, width)
            pointer, first = self.memory.data_ptr() + at, 0
            for sample, name, count in rows.rows:
                if name == tensor:
                    wanted = None if part is None else within(part[tensor], first, first + count)
                    destinations.append(Destination(sample, tensor, count, pointer, wanted))
                    pointer, first = pointer + BYTES_PER_VALUE * width * count, first + count
            at = _aligned(end)
        return destinations, views


def make_buffers(
    count: int, tokens_per_pack: int, widths: dict[str, int], *, pinned: bool
) -> tuple[Tensor, list[Buffer]]:
    """Allocate memory for ``count`` packs of at most ``tokens_per_pack`` tokens, and divide it into buffers.

    Args:
        pinned: whether to page-lock the memory, since a device copies from it.
    """
    size = sum(_aligned(BYTES_PER_VALUE * width * tokens_per_pack) for width in widths.values())
    memory = torch.empty(count * size, dtype=torch.uint8, pin_memory=pinned)
    return memory, [Buffer(part) for part in memory.split(size)]


def within(ascending: Tensor, first: int, end: int) -> tuple[tuple[int, int], ...]:
    """Return the runs of consecutive numbers inside a range, relative to its beginning."""
    cut = ((max(a, first) - first, min(b, end) - first) for a, b in runs(ascending))
    return tuple((a, b) for a, b in cut if a < b)


def only(views: dict[str, Tensor], part: Part | None) -> dict[str, list[Tensor]]:
    """Return the needed rows of each tensor as a few runs of consecutive rows, each of which is one copy."""
    if part is None:
        return {name: [view] for name, view in views.items()}
    return {name: [view[first:end] for first, end in runs(part[name])] for name, view in views.items()}


def joined(parts: list[Tensor]) -> Tensor:
    """Concatenate parts into one tensor; a single part is returned without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN

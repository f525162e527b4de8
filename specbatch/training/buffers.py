"""Host memory that packs are fetched into: registered with the store once, and used again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specbatch.capture import BYTES_PER_VALUE, CaptureContract
from specbatch.plan import Pack
from specbatch.training.drafts.pack import WHOLE, PackTensors, Share, runs
from specbatch.transfer.fetch import Destination

if TYPE_CHECKING:
    from specbatch.corpus import Corpus

_ALIGN = 64

Part = dict[str, Tensor]
"""int64, ascending: the rows of each tensor of a pack that a rank reads."""


@dataclass(frozen=True)
class PackRows:
    """The tokens of a pack, and how many rows of each tensor its samples have in the store."""

    input_ids: np.ndarray
    """int64 ``[tokens]``."""
    loss_mask: np.ndarray
    """bool ``[tokens]``."""
    lengths: tuple[int, ...]
    rows: tuple[tuple[int, str, int], ...]
    """Sample, tensor, rows: tensor by tensor, and in each the samples in the pack's order; none without rows."""

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
        )

    def count(self, tensor: str) -> int:
        """Rows of a tensor, of all samples."""
        return sum(rows for _, name, rows in self.rows if name == tensor)

    def bytes(self, widths: dict[str, int]) -> int:
        """Memory that `Buffer.place` needs for them."""
        return sum(_aligned(BYTES_PER_VALUE * width * self.count(tensor)) for tensor, width in widths.items())

    def tensors(self, aux: Tensor, last: Tensor, device: torch.device, share: Share = WHOLE) -> PackTensors:
        """What the draft reads. The mask stays on the host, where it is read."""
        ids = torch.from_numpy(self.input_ids).to(device, non_blocking=True)
        return PackTensors(ids, torch.from_numpy(self.loss_mask), self.lengths, aux, last, share)


def empty_pack(contract: CaptureContract, device: torch.device) -> PackTensors:
    """What the draft reads of a pack that trains as zero: no sample, no row."""
    empty = {
        name: torch.empty(0, width, dtype=torch.bfloat16, device=device) for name, width in contract.widths.items()
    }
    ids = torch.empty(0, dtype=torch.int64, device=device)
    return PackTensors(ids, torch.empty(0, dtype=torch.bool), (), empty["aux"], empty["last"])


class Buffer:
    """Memory for the rows of one pack at a time.

    Args:
        memory: uint8, one-dimensional, on the host.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.uploaded: torch.Event | None = None
        """Recorded once what is in the memory has been copied to the device."""

    def place(
        self, rows: PackRows, widths: dict[str, int], part: Part | None = None
    ) -> tuple[list[Destination], dict[str, Tensor]]:
        """Lay a pack out.

        Args:
            part: rows of each tensor that are needed; all if not given.

        Returns:
            where each sample's rows go, and bfloat16 views ``[rows, width]`` of what will be there.
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
    """Memory for so many packs of at most so many tokens, and its parts.

    Args:
        pinned: whether a device copies from it.
    """
    size = sum(_aligned(BYTES_PER_VALUE * width * tokens_per_pack) for width in widths.values())
    memory = torch.empty(count * size, dtype=torch.uint8, pin_memory=pinned)
    return memory, [Buffer(part) for part in memory.split(size)]


def within(ascending: Tensor, first: int, end: int) -> tuple[tuple[int, int], ...]:
    """The runs of neighbours among numbers, as far as they lie in a range, counted from its beginning."""
    cut = ((max(a, first) - first, min(b, end) - first) for a, b in runs(ascending))
    return tuple((a, b) for a, b in cut if a < b)


def only(views: dict[str, Tensor], part: Part | None) -> dict[str, list[Tensor]]:
    """Of each tensor the rows that are needed: few runs of neighbours, so that each is one copy."""
    if part is None:
        return {name: [view] for name, view in views.items()}
    return {name: [view[first:end] for first, end in runs(part[name])] for name, view in views.items()}


def joined(parts: list[Tensor]) -> Tensor:
    """Rows that lie apart as one tensor; what lies together stays where it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN

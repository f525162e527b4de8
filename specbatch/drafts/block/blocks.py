"""The blocks of a pack, in chunks: their positions, the rows that they see, and what their slots learn.

All of it follows from the masks and is computed on the host, so nothing waits for a device; copies to the device are
asynchronous.

Several ranks can train a pack together (`ContextShard`): each projects its rows of the target's states and computes its
blocks; the keys and values of all rows are gathered.

Shapes: ``R`` rows of ``aux`` of a whole pack, ``A`` blocks, ``K`` tokens that a block proposes, ``n`` blocks of a
chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specbatch.drafts.block.anchors import Draw, anchors, learning
from specbatch.drafts.block.contract import is_candidate
from specbatch.drafts.loss import LossRows
from specbatch.drafts.masks import Masks, SampleId
from specbatch.drafts.pack import ContextShard, PackTensors


@dataclass(frozen=True)
class Layout:
    """The rows and blocks of a whole pack. Tensors are int64, on the host."""

    samples: tuple[tuple[int, int], ...]
    """First row of ``aux`` and one past the last, of each sample that has any."""
    position_R: Tensor
    """Position of each row in its sample."""
    row_A: Tensor
    """Ascending: the last row that each block sees, which belongs to the position before its anchor."""
    position_A: Tensor
    """Position of the anchor in its sample."""
    token_A: Tensor
    """Index of the anchor in ``input_ids``."""
    target_KA: Tensor
    """Row of ``last`` that each proposed token is learnt from; -1 if it is not learnt."""
    targets: int
    """Number of rows of ``last``."""

    def divide_rows(self, ranks: int) -> list[Tensor]:
        """Return the rows of ``aux`` of each rank, ascending."""
        return list(torch.arange(len(self.position_R)).tensor_split(ranks))

    def divide_blocks(self, ranks: int) -> list[Tensor]:
        """Return the blocks of each rank, ascending. Each rank has one part from the first half and the mirrored part
        from the second, since later blocks see more keys."""
        parts = torch.arange(len(self.row_A)).tensor_split(2 * ranks)
        return [torch.cat([parts[rank], parts[-1 - rank]]) for rank in range(ranks)]

    def rows(self, share: ContextShard) -> dict[str, Tensor]:
        """Return the rows of each tensor that a rank reads, ascending."""
        if share.ranks == 1:
            return {"aux": torch.arange(len(self.position_R)), "last": torch.arange(self.targets)}
        target = self.target_KA[:, self.divide_blocks(share.ranks)[share.rank]]
        return {"aux": self.divide_rows(share.ranks)[share.rank], "last": target[target >= 0].unique()}


@dataclass(frozen=True)
class BlockChunk:
    """Consecutive blocks, and the rows of ``aux`` that they see. Tensors are int64, on the host."""

    keys: slice
    """The chunk's rows among the ``R`` rows."""
    samples: tuple[tuple[int, int], ...]
    """First and one past the last of these rows, for each sample."""
    row_n: Tensor
    """Ascending: the last of these rows that each block sees."""
    position_n: Tensor
    """Position of the anchor in its sample."""
    token_n: Tensor
    """Index of the anchor in ``input_ids``."""
    learns_M: Tensor
    """Ascending: the indices of slots that learn, counted over all blocks."""
    proposal_M: Tensor
    """For each of these slots, which of a block's proposed tokens it learns, from 0."""
    block_M: Tensor
    """For each of these slots, the block of the chunk that it belongs to."""
    targets: tuple[LossRows, ...]
    """For each proposed token, the slots that learn it, and the rows of the pack's ``last`` that they learn it from."""


@dataclass(frozen=True)
class Blocks:
    """The rows and blocks of a pack that a rank computes. Tensors are int64, on the host."""

    layout: Layout
    row_C: Tensor
    """Ascending: the rows of ``aux``, among all ``R``, that this rank projects."""
    of_ranks: tuple[Tensor, ...]
    """The same for each rank of the group."""
    chosen: Tensor
    """Ascending: the blocks that this rank computes."""
    target_KA: Tensor
    """For each proposed token of these blocks, the row of ``last`` that it is learnt from; -1 if it is not learnt."""

    def cut(self, size: int, block_size: int, first_slot: int) -> Iterator[BlockChunk]:
        """Cut the blocks into chunks of about the same size.

        Args:
            size: most blocks of a chunk.
            first_slot: the slot that proposes the first token.
        """
        if len(self.chosen):
            for part in torch.arange(len(self.chosen)).tensor_split(-(-len(self.chosen) // size)):
                yield self._chunk(part, block_size, first_slot)

    def _chunk(self, part: Tensor, block_size: int, first_slot: int) -> BlockChunk:
        layout, blocks = self.layout, self.chosen[part]
        row = layout.row_A[blocks]
        first_row, last_row = int(row[0]), int(row[-1])
        seen = [sample for sample in layout.samples if sample[0] <= last_row and sample[1] > first_row]
        keys = slice(seen[0][0], last_row + 1)
        target_Kn = self.target_KA[:, part]
        block_M, proposal_M = (target_Kn.T >= 0).nonzero().unbind(1)
        targets = []
        for k, target_n in enumerate(target_Kn):
            slots = (proposal_M == k).nonzero().flatten()
            targets.append(LossRows(slots, target_n[block_M[slots]]))
        return BlockChunk(
            keys=keys,
            samples=tuple((first - keys.start, min(end, keys.stop) - keys.start) for first, end in seen),
            row_n=row - keys.start,
            position_n=layout.position_A[blocks],
            token_n=layout.token_A[blocks],
            learns_M=block_M * block_size + first_slot + proposal_M,
            proposal_M=proposal_M,
            block_M=block_M,
            targets=tuple(targets),
        )


def lay_out(
    loss_mask: Tensor, lengths: tuple[int, ...], samples: tuple[SampleId, ...], draw: Draw, proposals: int
) -> Layout:
    """Find the blocks of a pack, and the rows that they learn from, as the contract defines them.

    Args:
        loss_mask: bool ``[tokens]``, of all samples, on the host.
        samples: ids of the samples; empty if nothing is drawn at random.
        proposals: ``K``.
    """
    masks = Masks(loss_mask.numpy(), np.array(lengths, dtype=np.int64), samples)
    anchor_N, candidate_N = anchors(masks, draw), is_candidate(masks)
    token_A = np.flatnonzero(anchor_N)
    sample_N = np.repeat(np.arange(len(lengths)), masks.lengths_S)
    ends_S = np.zeros(len(lengths), dtype=np.int64)
    np.maximum.at(ends_S, sample_N[candidate_N], masks.position_N[candidate_N])
    first_S = np.cumsum(ends_S) - ends_S
    target_N = np.cumsum(candidate_N) - 1
    learnt_KA = learning(masks, anchor_N, proposals)[:, token_A]
    ahead_K1 = np.arange(proposals)[:, None]
    # A token is learnt from the state before it: the k-th proposed token, from 0, from the state k after the anchor.
    state_KA = np.minimum(token_A + ahead_K1, max(len(target_N) - 1, 0))
    target_KA = np.where(learnt_KA, target_N[state_KA] if len(target_N) else state_KA, -1)
    position_R = np.concatenate([np.arange(0), *map(np.arange, ends_S)])
    position_A = masks.position_N[token_A]
    return Layout(
        samples=tuple((int(first), int(first + count)) for first, count in zip(first_S, ends_S, strict=True) if count),
        position_R=torch.from_numpy(position_R),
        row_A=torch.from_numpy(first_S[sample_N[token_A]] + position_A - 1),
        position_A=torch.from_numpy(position_A),
        token_A=torch.from_numpy(token_A),
        target_KA=torch.from_numpy(target_KA),
        targets=int(candidate_N.sum()),
    )


def locate(pack: PackTensors, draw: Draw, proposals: int) -> Blocks:
    """Find the rows and blocks that belong to this rank's share of a pack.

    Raises:
        ValueError: the tensors do not have the rows that the contract names.
    """
    layout = lay_out(pack.loss_mask.cpu(), pack.lengths, pack.samples, draw, proposals)
    rows = layout.rows(pack.share)
    for name, wanted in rows.items():
        if len(pack.rows[name]) != len(wanted):
            raise ValueError(f"the pack has {len(pack.rows[name])} rows of {name}, its masks ask for {len(wanted)}")
    chosen = layout.divide_blocks(pack.share.ranks)[pack.share.rank]
    target = layout.target_KA[:, chosen]
    return Blocks(
        layout=layout,
        row_C=rows["aux"],
        of_ranks=tuple(layout.divide_rows(pack.share.ranks)),
        chosen=chosen,
        target_KA=torch.where(target >= 0, torch.searchsorted(rows["last"], target), -1),
    )

"""Evaluation during training, on held-out packs that each rank keeps in host memory.

The engines compute them before the first step that ranks train together, as any other pack, so after every start of the
ranks they are there again. An evaluation draws no random number and changes no state: training goes on as without it.

Ranks that train packs together evaluate them together: each computes its columns, and all of them learn what was
proposed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from specbatch.capture import CaptureContract
from specbatch.dispatch.client import Client
from specbatch.dispatch.rendezvous import Rendezvous
from specbatch.manifest import Manifest
from specbatch.plan import Pack, Plan
from specbatch.training.buffers import Buffer, PackRows, Part, empty_pack, joined, only
from specbatch.training.drafting import acceptance_length, accepted_counts
from specbatch.training.drafts.pack import PackTensors, Share
from specbatch.training.fetch import read_into
from specbatch.training.metrics import of_all_ranks
from specbatch.transfer.fetch import Lost, remove_pack
from specbatch.transfer.store import StoreClient

if TYPE_CHECKING:
    from specbatch.corpus import Corpus

log = logging.getLogger(__name__)

CHUNK_LOGITS = 1 << 24
"""Most logits held while the target's own choices are computed: 64 MiB of float32."""


class Draft(Protocol):
    """What is asked of a draft (`specbatch.training.drafts`)."""

    def evaluate(self, pack: PackTensors, weights: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass
class _Kept:
    """A held-out pack; without views where no engine could compute it."""

    rows: PackRows
    buffer: Buffer
    part: Part | None
    """The rows that this rank reads; None: all."""
    views: dict[str, list[Tensor]] | None = None
    """Those rows."""
    greedy: np.ndarray | None = None
    """int64 ``[tokens]``: the target's most likely token after each position, -1 where it is not captured."""


class HeldOut:
    """Held-out packs of one rank, and what the draft makes of them.

    Args:
        count: numbers of columns that enter the loss of each unrolled step, from a sample's loss mask.
        ttt_steps: unrolled steps of the draft.
        step_decay: weight of an unrolled step's loss as a factor on the one before.
        draft_tokens: how many are proposed at a time; no more than ``ttt_steps`` are looked at.
        target_head: reads it, ``[vocabulary, hidden]``.
        device: where the draft is.
        share: which part of its packs this rank computes.
        part: as of `specbatch.training.fetch.Prefetcher`.
    """

    def __init__(
        self,
        client: Client,
        store: StoreClient,
        rendezvous: Rendezvous,
        plan: Plan,
        *,
        rank: int,
        ranks: int,
        corpus: Corpus,
        contract: CaptureContract,
        count: Callable[[np.ndarray], np.ndarray],
        ttt_steps: int,
        step_decay: float,
        draft_tokens: int,
        target_head: Callable[[], Tensor],
        device: torch.device,
        share: Share,
        part: Callable[[Tensor, tuple[int, ...], Share], Part] | None,
    ) -> None:
        self._share, self._part = share, part
        self._group: dist.ProcessGroup | None = None
        self._client, self._store, self._rendezvous, self._rank = client, store, rendezvous, rank
        self._contract, self._device, self._target_head, self._count = contract, device, target_head, count
        self._steps, self._decay, self._draft_tokens = ttt_steps, step_decay, min(draft_tokens, ttt_steps)
        packs = plan.assign_heldout(ranks // share.ranks)
        self._turns = max(map(len, packs))
        """Packs that each rank computes, so that all meet in the same collectives."""
        self._kept = self._allocate(packs[rank // share.ranks], corpus)

    def fetch(self, group: dist.ProcessGroup | None) -> None:
        """Take all packs out of the store; they are there, or on their way there again, once a step may begin.

        Args:
            group: the ranks that share packs with this one; None: they are not shared.

        Raises:
            RunError: if the dispatcher is gone.
        """
        self._group = group
        manifests = self._get_all()
        self._agree()
        # Only now: the others of the group read the same objects.
        for manifest in manifests:
            remove_pack(self._store, self._rendezvous.run, self._rendezvous.attempt, manifest)
        # Wider than it is stored: products that are rounded to bfloat16 tie.
        head = self._target_head().to(self._device, torch.float32)
        for kept in self._kept.values():
            if kept.views is not None:
                kept.greedy = self._choices(kept, kept.views["last"], head)
        log.info("held-out packs=%d", sum(kept.views is not None for kept in self._kept.values()))

    def _get_all(self) -> list[Manifest]:
        """Fetch this rank's part of each pack; void ones stay without.

        Returns:
            where they were.
        """
        wanted, found = set(self._kept), []
        while wanted:
            reply = self._client.wait(self._rank, sorted(wanted))
            for pack, why in reply.void:
                log.warning("void held-out pack=%s.%s why=%s", *pack, why)
                wanted.discard(pack)
            for manifest in reply.stored:
                try:
                    self._get(manifest)
                except Lost as lost:
                    log.warning("lost held-out pack=%s.%s claim=%d why=%s", *manifest.pack, manifest.claim, lost)
                    self._client.lost(self._rank, manifest.pack, manifest.claim, str(lost))
                else:
                    wanted.discard(manifest.pack)
                    found.append(manifest)
        return found

    def _agree(self) -> None:
        """Leave out what a rank of the group has not got."""
        here = [kept.views is not None for kept in self._kept.values()]
        everywhere = self._of_group(torch.tensor(here, dtype=torch.int64), dist.ReduceOp.MIN).tolist()
        for (pack, kept), all_have in zip(self._kept.items(), everywhere, strict=True):
            if kept.views is not None and not all_have:
                log.warning("void held-out pack=%d.%d why=a rank that evaluates it too has not got it", *pack)
                kept.views = None

    def _of_group(self, mine: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        """What the ranks of the group make of a tensor together."""
        if self._group is None:
            return mine
        there = mine.to(self._device)
        dist.all_reduce(there, operation, self._group)
        return there

    def evaluate(self, draft: Draft) -> dict[str, Any]:
        """What the draft is worth, the same on all ranks.

        Returns:
            ``loss``, ``losses`` and ``accuracy`` as a step's metrics have them; ``acceptance_length`` of greedy
            drafting and ``accepted``, its verify steps by accepted proposals; ``packs``, ``loss_tokens``, ``seconds``.
        """
        begun = time.perf_counter()
        packs = [kept for kept in self._kept.values() if kept.views is not None]
        results = torch.zeros(2, self._steps, dtype=torch.float64)
        counts = np.zeros(self._steps, dtype=np.int64)
        accepted = np.zeros(self._draft_tokens + 1, dtype=np.int64)
        weights = torch.ones(self._steps, device=self._device)
        for turn in range(self._turns):
            kept = packs[turn] if turn < len(packs) else None
            result, proposed = draft.evaluate(self._tensors(kept), weights)
            results += result.double().cpu()
            if kept is not None:
                proposed = self._of_group(proposed, dist.ReduceOp.MAX)
                steps, walked = self._walk(kept, proposed.cpu().numpy())
                counts, accepted = counts + steps, accepted + walked
        # Losses are of this rank's columns; what is counted is of whole packs, which each rank of a group knows.
        counted = [torch.from_numpy(counts), torch.from_numpy(accepted), torch.tensor([len(packs)])]
        parts = [results.flatten(), *(part * (self._share.rank == 0) for part in counted)]
        mine = torch.cat([part.to(self._device, torch.float64) for part in parts])
        total = of_all_ranks(mine).sum(0).cpu().numpy()
        losses, right, counts_K, accepted_D, (packs_of_all,) = np.split(
            total, np.cumsum([self._steps, self._steps, self._steps, self._draft_tokens + 1])
        )
        mean = [float(x / n) if n else None for x, n in zip(losses, counts_K, strict=True)]
        return {
            "loss": sum(self._decay**k * x for k, x in enumerate(mean) if x is not None),
            "losses": mean,
            "accuracy": [float(x / n) if n else None for x, n in zip(right, counts_K, strict=True)],
            "acceptance_length": acceptance_length(accepted_D),
            "accepted": accepted_D.astype(int).tolist(),
            "packs": int(packs_of_all),
            "loss_tokens": int(counts_K[0]),
            "seconds": time.perf_counter() - begun,
        }

    def _allocate(self, packs: list[Pack], corpus: Corpus) -> dict[tuple[int, int], _Kept]:
        """Memory for exactly these packs, registered with the store as one."""
        rows = {pack.id: PackRows.of(pack, corpus, self._contract) for pack in packs}
        sizes = [found.bytes(self._contract.widths) for found in rows.values()]
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8)
        if self._memory.nbytes:
            self._store.register(self._memory.data_ptr(), self._memory.nbytes)
        kept = {}
        for (pack, found), memory in zip(rows.items(), self._memory.split(sizes), strict=True):
            part = None
            if self._part is not None:
                part = self._part(torch.from_numpy(found.loss_mask), found.lengths, self._share)
            kept[pack] = _Kept(found, Buffer(memory), part)
        return kept

    def _get(self, manifest: Manifest) -> None:
        kept = self._kept[manifest.pack]
        if kept.rows.rows:
            views = read_into(
                kept.buffer, kept.rows, manifest, self._store, self._rendezvous, self._contract, kept.part
            )
            kept.views = only(views, kept.part)

    def _tensors(self, kept: _Kept | None) -> PackTensors:
        if kept is None or kept.views is None:
            return empty_pack(self._contract, self._device)
        aux, last = (joined(kept.views[name]).to(self._device) for name in ("aux", "last"))
        return kept.rows.tensors(aux, last, self._device, self._share)

    def _choices(self, kept: _Kept, last: Sequence[Tensor], head: Tensor) -> np.ndarray:
        """The target's most likely tokens, over its whole vocabulary, at all positions that the group knows of.

        Args:
            last: the rows that this rank has.
        """
        rows, size = kept.rows, max(1, CHUNK_LOGITS // head.shape[0])
        chosen = [
            (chunk.to(head.device, head.dtype) @ head.T).argmax(-1).cpu() for run in last for chunk in run.split(size)
        ]
        first, positions = 0, []
        for length in rows.lengths:
            positions.append(first + self._contract.rows(rows.loss_mask[first : first + length])["last"])
            first += length
        where = torch.from_numpy(np.concatenate(positions))
        greedy = torch.full((len(rows.input_ids),), -1)
        greedy[where if kept.part is None else where[kept.part["last"]]] = torch.cat(chosen)
        return self._of_group(greedy, dist.ReduceOp.MAX).cpu().numpy()

    def _walk(self, kept: _Kept, proposed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Columns in the loss of each unrolled step, and verify steps by accepted proposals, of a pack."""
        assert kept.greedy is not None
        counts = np.zeros(self._steps, dtype=np.int64)
        accepted = np.zeros(self._draft_tokens + 1, dtype=np.int64)
        first = 0
        for length in kept.rows.lengths:
            part = slice(first, first + length)
            mask = kept.rows.loss_mask[part]
            counts += self._count(mask)
            accepted += accepted_counts(proposed[:, part], kept.greedy[part], mask, self._draft_tokens)
            first += length
        return counts, accepted

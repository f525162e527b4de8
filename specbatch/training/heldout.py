"""Evaluation during training, on held-out packs that each rank keeps in host memory.

Engines compute them like any other pack, before the first step after each start of the ranks. An evaluation draws no
random numbers and changes no state, so it has no effect on training.

Ranks that train packs together evaluate them together: each computes its columns, and all ranks of the group receive
all proposals.
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

from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import ConnectionFile
from specbatch.drafts.base import Algorithm
from specbatch.drafts.masks import Masks
from specbatch.drafts.pack import ContextShard, PackTensors
from specbatch.evaluation.replayed import acceptance_length, accepted_counts, right_counts
from specbatch.pack_manifest import Manifest
from specbatch.plan import Pack, PackPlan
from specbatch.training.feed.buffers import Buffer, PackRows, Part, ShareRows, empty_pack, joined, only
from specbatch.training.feed.prefetcher import read_into
from specbatch.training.metrics import gather_numbers
from specbatch.transfer.pack_reader import PackLost, remove_pack
from specbatch.transfer.store import StoreClient

if TYPE_CHECKING:
    from specbatch.corpus import Corpus

log = logging.getLogger(__name__)

CHUNK_LOGITS = 1 << 24
"""Most logits in memory while the target's own choices are computed: 64 MiB of float32."""


class EvaluatedDraft(Protocol):
    """The methods of a draft that evaluation calls (`specbatch.drafts.base.Module`)."""

    def evaluate(self, pack: PackTensors, weights: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass
class _Kept:
    """A held-out pack; it has no views if no engine could compute it."""

    rows: PackRows
    buffer: Buffer
    part: Part | None
    """The rows that this rank reads; None means all."""
    views: dict[str, list[Tensor]] | None = None
    """These rows in host memory; None if the pack is void."""
    greedy: np.ndarray | None = None
    """The target's most likely token after each position, -1 where it is not captured: int64 ``[tokens]``."""

    @property
    def masks(self) -> Masks:
        """Return the loss masks of the pack's samples."""
        return Masks(self.rows.loss_mask, np.array(self.rows.lengths, np.int64), self.rows.samples)


class HeldOut:
    """The held-out packs of one rank, and the evaluation of a draft on them.

    Args:
        algorithm: gives the contract and the terms of the loss.
        draft_tokens: proposals at a time; those beyond what the draft was trained to propose are ignored.
        target_head: reads the target's head, ``[vocabulary, hidden]``, and its bias. Scale and cap don't change which
            token is the most likely.
        device: where the draft is.
        share: which part of its packs this rank computes.
        part: as for `specbatch.training.feed.prefetcher.Prefetcher`.
    """

    def __init__(
        self,
        client: Client,
        store: StoreClient,
        rendezvous: ConnectionFile,
        plan: PackPlan,
        *,
        rank: int,
        ranks: int,
        corpus: Corpus,
        algorithm: Algorithm,
        draft_tokens: int,
        target_head: Callable[[], tuple[Tensor, Tensor | None]],
        device: torch.device,
        share: ContextShard,
        part: ShareRows | None,
    ) -> None:
        self._share, self._part = share, part
        self._group: dist.ProcessGroup | None = None
        self._client, self._store, self._rendezvous, self._rank = client, store, rendezvous, rank
        self._algorithm, self._contract, self._final = algorithm, algorithm.contract, algorithm.contract.final
        self._device, self._target_head = device, target_head
        self._terms, self._draft_tokens = len(algorithm.terms), min(draft_tokens, algorithm.proposals)
        packs = plan.assign_heldout(ranks // share.ranks)
        self._turns = max(map(len, packs))
        """Packs that each rank computes: the same number everywhere, since each takes part in the same collectives."""
        self._kept = self._allocate(packs[rank // share.ranks], corpus)

    def fetch(self, group: dist.ProcessGroup | None) -> None:
        """Take all packs out of the store. They are stored, or being computed again, by the time a step may begin.

        Args:
            group: the ranks that share packs with this one; None if packs are not shared.

        Raises:
            RunError: the dispatcher is gone.
        """
        self._group = group
        manifests = self._get_all()
        self._agree()
        # Not earlier, since the other ranks of the group read the same objects.
        for manifest in manifests:
            remove_pack(self._store, self._rendezvous.run, self._rendezvous.attempt, manifest)
        # In float32, since products that are rounded to bfloat16 often tie.
        if self._final is not None:
            head, bias = self._target_head()
            head = head.to(self._device, torch.float32)
            bias = None if bias is None else bias.to(self._device, torch.float32)
            for kept in self._kept.values():
                if kept.views is not None:
                    kept.greedy = self._choices(kept, kept.views[self._final], self._final, head, bias)
        log.info("held-out packs=%d", sum(kept.views is not None for kept in self._kept.values()))

    def _get_all(self) -> list[Manifest]:
        """Fetch this rank's part of each pack, except of void ones.

        Returns:
            the manifests of the fetched packs.
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
                except PackLost as lost:
                    log.warning("lost held-out pack=%s.%s claim=%d why=%s", *manifest.pack, manifest.claim, lost)
                    self._client.lost(self._rank, manifest.pack, manifest.claim, str(lost))
                else:
                    wanted.discard(manifest.pack)
                    found.append(manifest)
        return found

    def _agree(self) -> None:
        """Leave out each pack that any rank of the group lacks."""
        here = [kept.views is not None for kept in self._kept.values()]
        everywhere = self._of_group(torch.tensor(here, dtype=torch.int64), dist.ReduceOp.MIN).tolist()
        for (pack, kept), all_have in zip(self._kept.items(), everywhere, strict=True):
            if kept.views is not None and not all_have:
                log.warning("void held-out pack=%d.%d why=another rank of its group lacks it", *pack)
                kept.views = None

    def _of_group(self, mine: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        """Reduce a tensor over the ranks of the group."""
        if self._group is None:
            return mine
        there = mine.to(self._device)
        dist.all_reduce(there, operation, self._group)
        return there

    def evaluate(self, draft: EvaluatedDraft) -> dict[str, Any]:
        """Evaluate the draft on the held-out packs; all ranks return the same.

        Returns:
            ``loss`` and ``losses`` as in a step's metrics; ``accuracy`` too, but against the target's choices among its
            whole vocabulary, so it is lower for a draft with a pruned vocabulary; ``acceptance_length`` of greedy
            drafting; ``accepted``, the number of verify steps for each number of accepted proposals; ``packs``,
            ``loss_tokens``, ``seconds``.
        """
        begun = time.perf_counter()
        packs = [kept for kept in self._kept.values() if kept.views is not None]
        results = torch.zeros(2, self._terms, dtype=torch.float64)
        counts = np.zeros(self._terms, dtype=np.int64)
        accepted = np.zeros(self._draft_tokens + 1, dtype=np.int64)
        judged = np.zeros((2, self._algorithm.proposals), dtype=np.int64)
        weights = torch.ones(self._terms, device=self._device)
        for turn in range(self._turns):
            kept = packs[turn] if turn < len(packs) else None
            result, proposed = draft.evaluate(self._tensors(kept), weights)
            results += result.double().cpu()
            if kept is not None:
                proposed = self._of_group(proposed, dist.ReduceOp.MAX)
                counts = counts + self._algorithm.counts(kept.masks).sum(axis=-1)
                accepted = accepted + self._walk(kept, proposed.cpu().numpy())
                if kept.greedy is not None:
                    judged += right_counts(proposed.cpu().numpy(), kept.greedy)
        # Losses cover this rank's columns only; counts cover whole packs, and each rank of a group has them.
        counted = [
            torch.from_numpy(counts), torch.from_numpy(accepted), torch.from_numpy(judged).flatten(),
            torch.tensor([len(packs)]),
        ]  # fmt: skip
        parts = [results.flatten(), *(part * (self._share.rank == 0) for part in counted)]
        mine = torch.cat([part.to(self._device, torch.float64) for part in parts])
        total = gather_numbers(mine).sum(0).cpu().numpy()
        losses, right_T, counts_T, accepted_D, judged_2K, (packs_of_all,) = np.split(
            total, np.cumsum([self._terms, self._terms, self._terms, self._draft_tokens + 1, judged.size])
        )
        mean = [float(x / n) if n else None for x, n in zip(losses, counts_T, strict=True)]
        shares = self._algorithm.shares(counts_T.astype(np.int64)).tolist()
        return {
            "loss": sum(share * x for share, x in zip(shares, mean, strict=True) if x is not None),
            "losses": mean,
            "accuracy": self._accuracy(right_T, counts_T, judged_2K.reshape(judged.shape)),
            "acceptance_length": acceptance_length(accepted_D),
            "accepted": accepted_D.astype(int).tolist(),
            "packs": int(packs_of_all),
            "loss_tokens": int(counts_T[0]),
            "seconds": time.perf_counter() - begun,
        }

    def _accuracy(self, right_T: np.ndarray, counts_T: np.ndarray, judged_2K: np.ndarray) -> list[float | None]:
        """Return how often each term that proposes a token is right. For other terms, and where the target's choices
        are unknown, return what the draft reports."""
        found: list[float | None] = []
        for term, right, count in zip(self._algorithm.terms, right_T, counts_T, strict=True):
            if term.position is not None and judged_2K[1, term.position]:
                right, count = judged_2K[:, term.position]
            found.append(float(right / count) if count else None)
        return found

    def _allocate(self, packs: list[Pack], corpus: Corpus) -> dict[tuple[int, int], _Kept]:
        """Allocate memory for exactly these packs, registered with the store as one block."""
        rows = {pack.id: PackRows.of(pack, corpus, self._contract) for pack in packs}
        sizes = [found.bytes(self._contract.widths) for found in rows.values()]
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8)
        if self._memory.nbytes:
            self._store.register(self._memory.data_ptr(), self._memory.nbytes)
        kept = {}
        for (pack, found), memory in zip(rows.items(), self._memory.split(sizes), strict=True):
            part = None
            if self._part is not None:
                part = self._part(torch.from_numpy(found.loss_mask), found.lengths, found.samples, self._share)
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
        rows = {name: joined(parts).to(self._device) for name, parts in kept.views.items()}
        return kept.rows.tensors(rows, self._device, self._share)

    def _choices(
        self, kept: _Kept, final: Sequence[Tensor], name: str, head: Tensor, bias: Tensor | None
    ) -> np.ndarray:
        """Return the target's most likely tokens, over its whole vocabulary, at all positions that the group captured.

        Args:
            final: this rank's rows of the states after the final norm.
            name: name of this tensor in the contract.
        """
        rows, size = kept.rows, max(1, CHUNK_LOGITS // head.shape[0])
        chosen = [
            (chunk.to(head.device, head.dtype) @ head.T + (0 if bias is None else bias)).argmax(-1).cpu()
            for run in final
            for chunk in run.split(size)
        ]
        first, positions = 0, []
        for length in rows.lengths:
            positions.append(first + self._contract.rows(rows.loss_mask[first : first + length])[name])
            first += length
        where = torch.from_numpy(np.concatenate(positions))
        greedy = torch.full((len(rows.input_ids),), -1)
        greedy[where if kept.part is None else where[kept.part[name]]] = torch.cat(chosen)
        return self._of_group(greedy, dist.ReduceOp.MAX).cpu().numpy()

    def _walk(self, kept: _Kept, proposed: np.ndarray) -> np.ndarray:
        """Return the number of a pack's verify steps for each number of accepted proposals."""
        accepted = np.zeros(self._draft_tokens + 1, dtype=np.int64)
        if kept.greedy is None:
            return accepted
        first = 0
        for length in kept.rows.lengths:
            part = slice(first, first + length)
            mask = kept.rows.loss_mask[part]
            accepted += accepted_counts(proposed[:, part], kept.greedy[part], mask, self._draft_tokens)
            first += length
        return accepted

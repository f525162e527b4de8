"""DFlash and DSpark as a `specbatch.drafts.base.Algorithm`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

from specbatch.drafts.base import Term
from specbatch.drafts.block.config import BlockDraft, DFlashDraft, DSparkDraft
from specbatch.drafts.block.memory import BlockShape, rank_memory
from specbatch.drafts.decoder_algorithm import DecoderAlgorithm
from specbatch.errors import UserError
from specbatch.tokenizer_ids import tokenizer_ids

if TYPE_CHECKING:
    import numpy as np
    import torch

    from specbatch.corpus import Corpus
    from specbatch.drafts.block.anchors import Draw
    from specbatch.drafts.block.contract import BlockContract
    from specbatch.drafts.block.files import BlockFiles, Kind
    from specbatch.drafts.block.model import BlockSettings
    from specbatch.drafts.block.objective import Objective
    from specbatch.drafts.masks import Costs, Masks, SampleId
    from specbatch.drafts.pack import ContextShard

SMALL_CORPUS = 1_000_000
"""Loss tokens below which a block draft is not worth training: EAGLE-3 reaches a higher acceptance length there."""


class BlockAlgorithm(DecoderAlgorithm):
    """Code that DFlash and DSpark share."""

    kind: ClassVar[Kind]
    first_slot: ClassVar[int]
    """The slot that proposes the first token."""
    computed = "slots of blocks"
    changed_logits = True

    @cached_property
    def draft(self) -> BlockDraft:
        """The ``draft`` section of the configuration."""
        return cast(BlockDraft, self.config.draft)

    @cached_property
    def contract(self) -> BlockContract:
        from specbatch.drafts.block.contract import BlockContract

        return BlockContract(self._aux_layers(), self.target.hidden)

    @cached_property
    def shape(self) -> BlockShape:
        """The shape of the draft."""
        draft = self.draft
        return BlockShape(
            **self._layer_shape,
            aux_layers=len(self.contract.aux_layers),
            layers=draft.num_layers,
            block_size=draft.block_size,
            first_slot=self.first_slot,
        )

    @cached_property
    def draw(self) -> Draw:
        """How anchors are drawn."""
        from specbatch.drafts.block.anchors import Draw

        return Draw(self.config.run.seed, self.draft.anchors)

    @property
    def d_pace(self) -> bool:
        """Whether slots are weighted by D-PACE."""
        return False

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        return tuple(Term(f"slot {self.first_slot + k}", k) for k in range(self.shape.proposals))

    @classmethod
    def teaches(cls, loss_mask: np.ndarray) -> bool:
        from specbatch.drafts.block.contract import is_candidate
        from specbatch.drafts.masks import Masks

        return bool(is_candidate(Masks.of([loss_mask])).any())

    def counts(self, masks: Masks) -> np.ndarray:
        from specbatch.drafts.block.cost import counts_of

        return counts_of(masks, self.draw, self.shape)

    def shares(self, counts_T: np.ndarray) -> np.ndarray:
        import numpy as np

        order = np.arange(len(counts_T)) % self.shape.proposals
        decay = np.ones(len(order)) if self.d_pace else np.exp(-order / self.draft.position_decay)
        weighted = decay * counts_T
        total = weighted[: self.shape.proposals].sum()
        return weighted / total if total else np.zeros(len(order))

    def costs(self, masks: Masks) -> Costs:
        from specbatch.drafts.block.cost import costs_of

        return costs_of(masks, self.draw, self.shape, d_pace=self.d_pace)

    def memory(self) -> dict[str, int]:
        return rank_memory(self.config, self.shape, self.target.dtype)

    def description(self) -> list[str]:
        return [f"{self.shape.layers} layers of {self.size.text()}", *self.size.reasons]

    def check(self) -> list[str]:
        chosen, mask_token = self.contract.aux_layers, self.draft.mask_token_id
        if list(chosen) != sorted(set(chosen)):
            raise UserError(
                f"draft.aux_layers: {list(chosen)}: {self.title} reads distinct layers in ascending order; leave it "
                "out for the default ones"
            )
        self._check_readable(chosen, "leave it out for the default ones")
        if mask_token is None:
            raise UserError(
                f"draft.mask_token_id: {self.title} needs a token for empty slots that never occurs in text"
                f"{self._unused_tokens()}"
            )
        if mask_token >= self.target.vocab:
            raise UserError(
                f"draft.mask_token_id: {mask_token} is not one of the target's {self.target.vocab} tokens"
                f"{self._unused_tokens()}"
            )
        if mask_token in self.target.eos:
            raise UserError(
                f"draft.mask_token_id: {mask_token} ends an answer, so it occurs in the text{self._unused_tokens()}"
            )
        return []

    def check_corpus(self, corpus: Corpus) -> list[str]:
        """Check the prepared corpus.

        Returns:
            warnings.

        Raises:
            UserError: the mask token occurs in it, or every answer is shorter than a block.
        """
        mask_token = self.draft.mask_token_id
        if mask_token is not None and (sample := corpus.first_with(mask_token)) is not None:
            raise UserError(
                f"draft.mask_token_id: {mask_token} occurs in the corpus ({corpus.place(sample)}); choose a token that "
                f"does not{self._unused_tokens()}"
            )
        if not any(map(self._last_slot_learns, corpus.masks())):
            raise UserError(
                f"draft.block_size: {self.draft.block_size}: every answer of the corpus has at most "
                f"{self.shape.proposals} tokens, so the last slot of a block would learn nothing; use a smaller block"
            )
        learnt = int(corpus.loss_token_counts.sum())
        if learnt < SMALL_CORPUS:
            return [
                f"draft.algorithm: {self.name} learns slowly, and the corpus has {learnt} loss tokens: below "
                f"{SMALL_CORPUS} eagle3 accepts more"
            ]
        return []

    def facts(self) -> dict[str, Any]:
        draft = self.draft
        return {
            "algorithm": draft.algorithm,
            "num_layers": draft.num_layers,
            "block_size": draft.block_size,
            "mask_token_id": draft.mask_token_id,
            "anchors": draft.anchors,
            "position_decay": draft.position_decay,
            "aux_layers": list(self.contract.aux_layers),
            **self.size.facts(self.target),
        }

    @cached_property
    def files(self) -> BlockFiles:
        from specbatch.drafts.block.files import BlockFiles

        return BlockFiles(self.kind, self.draft, self.target, self.shape, self.contract.aux_layers)

    def settings(self, corpus: Corpus) -> BlockSettings:
        from specbatch.drafts.block.settings import settings

        return settings(self.config, self.draft, self.target, self.shape, self.draw, self._objective())

    def module(self) -> type[torch.nn.Module]:
        from specbatch.drafts.block.model import BlockModule

        return BlockModule

    def share_rows(
        self, loss_mask: torch.Tensor, lengths: tuple[int, ...], samples: tuple[SampleId, ...], share: ContextShard
    ) -> dict[str, torch.Tensor]:
        from specbatch.drafts.block.blocks import lay_out

        return lay_out(loss_mask, lengths, samples, self.draw, self.shape.proposals).rows(share)

    def _last_slot_learns(self, masks: Masks) -> bool:
        """Return whether any of the samples has a position at which the last token of a block learns."""
        from specbatch.drafts.block.anchors import learning
        from specbatch.drafts.block.contract import is_candidate

        return bool(learning(masks, is_candidate(masks), self.shape.proposals)[-1].any())

    @abstractmethod
    def _objective(self) -> Objective:
        """Return what the slots learn."""

    def _aux_layers(self) -> tuple[int, ...]:
        """Return the configured layers, else those that DFlash's authors read."""
        if self.draft.aux_layers is not None:
            return tuple(self.draft.aux_layers)
        from specbatch.drafts.block.contract import default_aux_layers

        try:
            return default_aux_layers(self.draft.num_layers, self.target.layers)
        except ValueError as error:
            raise UserError(
                f"draft.aux_layers: {self.title} reads layers below the last one, and the target {self.target.path} "
                f"has only {self.target.layers}"
            ) from error

    def _unused_tokens(self) -> str:
        """Return a hint that names suitable tokens."""
        known = tokenizer_ids(self.target.path)
        free = [str(token) for token in range(self.target.vocab) if known and token not in known]
        if free:
            return f"; {self.target.path} has no text for {free[0]}, which is suitable"
        special = {self.target.bos, self.target.pad, *self.target.eos}
        named = [f"{i} ({text})" for i, text in sorted(known.items()) if text.startswith("<") and i not in special]
        return f"; perhaps {' or '.join(named[:3])}" if named else ""


class DFlash(BlockAlgorithm):
    """DFlash for one configuration and target."""

    name = "dflash"
    title = "DFlash"
    section = DFlashDraft
    kind = "dflash"
    first_slot = 1

    @property
    def d_pace(self) -> bool:
        return self._own.d_pace

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"loss": self._own.loss, "d_pace": self._own.d_pace}

    @property
    def _own(self) -> DFlashDraft:
        return cast(DFlashDraft, self.config.draft)

    def _objective(self) -> Objective:
        from specbatch.drafts.block.objective import Objective

        token = float(self._own.loss == "ce")
        return Objective(token=token, distribution=1 - token, d_pace=self._own.d_pace)


class DSpark(BlockAlgorithm):
    """DSpark for one configuration and target."""

    name = "dspark"
    title = "DSpark"
    section = DSparkDraft
    kind = "dspark"
    first_slot = 0

    @cached_property
    def shape(self) -> BlockShape:
        return replace(super().shape, markov_rank=self._own.markov_rank, confidence=self._own.confidence)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        slots = super().terms
        sure = tuple(Term(f"confidence {term.position}", None) for term in slots) if self._own.confidence else ()
        return slots + sure

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"markov_rank": self._own.markov_rank, "confidence": self._own.confidence}

    @property
    def _own(self) -> DSparkDraft:
        return cast(DSparkDraft, self.config.draft)

    def _objective(self) -> Objective:
        from specbatch.drafts.block.objective import Objective

        # The mixture of DSpark's authors.
        return Objective(token=0.1, distance=0.9)

"""The files of EAGLE-3 drafts (`specbatch.drafts.base.Files`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.drafts.eagle3.hf_config import hf_config
from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.eagle3.published import EMBEDDING, HEAD, PublishedEagle3, read_published, shapes, starting_tensors
from specbatch.target import TargetShape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Eagle3Files:
    """The files of a draft of this shape."""

    draft: Eagle3Draft
    target: TargetShape
    shape: Shape
    aux_layers: tuple[int, ...]

    def checkpoint(self, stored: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
        import torch

        from specbatch.drafts.checkpoint import DRAFT_IDS, checked, vocabulary_maps

        ids = stored.get(DRAFT_IDS, torch.arange(self.target.vocab))
        maps = vocabulary_maps(ids, self.target.vocab, where)
        expected = shapes(self.shape, len(ids))
        if EMBEDDING in stored:
            expected[EMBEDDING] = (self.target.vocab, self.target.hidden)
        return checked({name: tensor for name, tensor in stored.items() if name != DRAFT_IDS}, expected, where) | maps

    def hf_config(self, tensors: Mapping[str, torch.Tensor], *, target_name: str, draft_tokens: int) -> dict[str, Any]:
        return hf_config(
            self.target,
            self.shape,
            target_name=target_name,
            aux_layers=self.aux_layers,
            draft_vocab=tensors[HEAD].shape[0],
            draft_tokens=draft_tokens,
            own_embedding=EMBEDDING in tensors,
        )

    def read_published(self) -> PublishedEagle3:
        return read_published(self.draft, self.target, self.shape, self.aux_layers)

    def starting_tensors(self, published: Any, settings: Any, target_head: torch.Tensor) -> dict[str, torch.Tensor]:
        # Rows that the draft lacks start as `Eagle3Module.initialize` sets them.
        scale = self.target.logits.scale
        return starting_tensors(published, settings.draft_ids, target_head if scale == 1 else target_head * scale)

    def serve(self, engine: str, draft_tokens: int) -> dict[str, Any] | None:
        return {
            "sglang": {
                "speculative_algorithm": "EAGLE3",
                "speculative_eagle_topk": 1,
                "speculative_num_steps": draft_tokens,
                "speculative_num_draft_tokens": draft_tokens + 1,
            },
            "vllm": {"method": "eagle3", "num_speculative_tokens": draft_tokens},
        }.get(engine)

"""A draft algorithm in a package outside of specbatch: one linear head beside the target's own.

From the newest token ``i`` it proposes one token: the state of a single layer at ``i - 1`` and the embedding of token
``i`` are projected and go through the target's head, ``q = softmax(W_head RMSNorm(W [A_{i-1}; E[x_i]]))``; it learns
the target's distribution at ``i``. Unlike EAGLE-3 it has one layer, other rows, one term and no attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from specbatch.config.sections import Draft, Natural
from specbatch.drafts.base import Algorithm, CaptureContract, TensorSpec, Term
from specbatch.drafts.masks import Costs, Masks
from specbatch.errors import UserError


@dataclass
class HeadDraft(Draft):
    """One linear head in addition to the target's."""

    algorithm: str = "parallel_head"
    layer: Natural = 2
    """The layer whose output it reads."""


@dataclass(frozen=True)
class HeadContract(CaptureContract):
    layer: int
    hidden: int

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        return {"state": TensorSpec((self.layer,), self.hidden), "final": TensorSpec(None, self.hidden)}

    def rows(self, loss_mask: np.ndarray) -> dict[str, np.ndarray]:
        newest = np.flatnonzero(learns(Masks.of([loss_mask]))).astype(np.int64)
        return {"state": newest - 1, "final": newest}


def learns(masks: Masks) -> np.ndarray:
    """bool ``[N]``: the tokens after which a loss token comes, the first of a sample excepted."""
    return masks.ahead(masks.mask_N, 1) & (masks.position_N >= 1)


@dataclass(frozen=True)
class HeadSettings:
    hidden: int
    draft_ids: tuple[int, ...]


class ParallelHead(Algorithm):
    name, title, section, computed = "parallel_head", "Parallel head", HeadDraft, "columns"

    @cached_property
    def contract(self) -> HeadContract:
        return HeadContract(self.config.draft.layer, self.target.hidden)

    terms = (Term("head 0", 0),)

    @classmethod
    def teaches(cls, loss_mask: np.ndarray) -> bool:
        return bool(learns(Masks.of([loss_mask])).any())

    def counts(self, masks: Masks) -> np.ndarray:
        return masks.total(learns(masks)[None])

    def shares(self, counts_T: np.ndarray) -> np.ndarray:
        return np.ones(1)

    def costs(self, masks: Masks) -> Costs:
        newest_N = learns(masks)
        count_S, hidden = masks.total(newest_N), self.target.hidden
        forward_S = count_S * 2.0 * (2 * hidden**2 + 2 * hidden * self.target.vocab)
        captured_S = np.maximum.reduceat(np.where(newest_N, masks.position_N + 1, 0), masks.starts_S)
        rows_S = {"state": count_S, "final": count_S}
        return Costs(captured_S, rows_S, count_S[None], count_S[None], 3 * forward_S, forward_S)

    def memory(self) -> dict[str, int]:
        return {"everything": 16 * 2 * self.target.hidden**2 + 12 * self.target.vocab * self.target.hidden}

    def check(self) -> list[str]:
        if self.config.draft.layer > self.target.layers - 2:
            raise UserError(f"draft.layer: {self.config.draft.layer} is none of the target's that can be read")
        return []

    def facts(self) -> dict[str, Any]:
        return {"algorithm": self.name, "layer": self.config.draft.layer}

    @cached_property
    def files(self) -> HeadFiles:
        return HeadFiles(self.target.hidden)

    def settings(self, corpus: Any) -> HeadSettings:
        return HeadSettings(self.target.hidden, tuple(range(self.target.vocab)))

    def module(self) -> type:
        from tests.drafts.toy.module import HeadModule

        return HeadModule

    def share_rows(self, loss_mask: Any, lengths: Any, samples: Any, share: Any) -> dict[str, Any]:
        raise UserError("training.context_parallel: a parallel head does not share packs")


@dataclass(frozen=True)
class HeadFiles:
    hidden: int

    def checkpoint(self, stored: Mapping[str, Any], where: str) -> dict[str, Any]:
        from specbatch.drafts.checkpoint import DRAFT_IDS, checked

        own = {name: tensor for name, tensor in stored.items() if name != DRAFT_IDS}
        return checked(own, {"fc.weight": (self.hidden, 2 * self.hidden)}, where)

    def hf_config(self, tensors: Mapping[str, Any], *, target_name: str, draft_tokens: int) -> dict[str, Any]:
        return {"architectures": ["ParallelHead"], "hidden_size": self.hidden}

    def read_published(self) -> Any:
        raise UserError("draft.init_from: a parallel head starts anew")

    def starting_tensors(self, published: Any, settings: Any, target_head: Any) -> dict[str, Any]:
        raise UserError("draft.init_from: a parallel head starts anew")

    def serve(self, engine: str, draft_tokens: int) -> dict[str, Any] | None:
        return None

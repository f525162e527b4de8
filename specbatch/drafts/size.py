"""The draft's shape: from the configuration, else from the target, else from published drafts.

A target's numbers do not always make a good draft: a mixture's `intermediate_size` may be that of one expert, the key
heads of a latent attention cost nothing in the target's cache but a lot in the draft's, and transformers rejects a
Llama whose heads do not divide its hidden size. Pure, so that plan, training and export agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from specbatch.config.sections import Draft
from specbatch.config.types import Count
from specbatch.errors import UserError

if TYPE_CHECKING:
    from specbatch.target import TargetShape

_EXPERTS_MLP = 6
"""Ratio of MLP width to hidden size, for mixtures without dense layers. Published drafts: Qwen3-30B-A3B, 235B-A22B and
gpt-oss 6, Llama-4-Scout 6.4, DeepSeek-V3 5.7, Qwen3-Next 8, MiniMax-M2.5 3."""
_LATENT_KEY_HEADS = 8
"""Key heads if the target caches a latent: as in DeepSeek-V3's published draft, which has 56 heads for 128."""


@dataclass
class SizedDraft(Draft):
    """The ``draft`` section of an algorithm whose layers are those of a Llama or a Qwen3."""

    num_attention_heads: Count | None = None
    """Attention heads of the draft. If not given, the target's, if they divide the hidden size."""
    num_key_value_heads: Count | None = None
    """Key heads of the draft; each costs memory when the draft is served. If not given, the target's, or 8 if the
    target caches a latent instead (MLA)."""
    head_dim: Count | None = None
    """Width of a head; the target's if not given."""
    intermediate_size: Count | None = None
    """Width of the draft's MLP. If not given, the target's, or six times the hidden size for mixtures without dense
    layers. `specbatch plan` shows what was chosen."""


@dataclass(frozen=True)
class DraftSize:
    """Size of each of the draft's layers; names are those of `specbatch.target.TargetShape`."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    reasons: tuple[str, ...] = ()
    """For people: why defaults differ from the target's values."""

    def facts(self, target: TargetShape) -> dict[str, int]:
        """Return what must be the same when training continues from a snapshot, by configuration keys; heads only if
        they are not the target's, since older snapshots do not contain them."""
        heads = {
            "num_attention_heads": (self.heads, target.heads),
            "num_key_value_heads": (self.kv_heads, target.kv_heads),
            "head_dim": (self.head_dim, target.head_dim),
        }
        other = {name: own for name, (own, of_target) in heads.items() if own != of_target}
        return {"intermediate_size": self.intermediate, **other}

    def text(self) -> str:
        """Return a description of the size."""
        return f"{self.heads} heads of {self.head_dim}, {self.kv_heads} key heads, an MLP of {self.intermediate}"


def draft_size(draft: SizedDraft, target: TargetShape) -> DraftSize:
    """Return the configured sizes, and defaults for the rest.

    Raises:
        UserError: engines could not load such a draft.
    """
    reasons: list[str] = []
    head_dim = draft.head_dim or target.head_dim
    heads = draft.num_attention_heads or _heads(target, head_dim, reasons)
    kv_heads = draft.num_key_value_heads or _kv_heads(target, heads, reasons)
    intermediate = draft.intermediate_size or _intermediate(target, reasons)
    if target.hidden % heads:
        raise UserError(
            f"draft.num_attention_heads: {heads} does not divide the hidden size {target.hidden}, and transformers "
            f"rejects such a draft; try {_divisor(target.hidden, heads)}"
        )
    if heads % kv_heads:
        raise UserError(
            f"draft.num_key_value_heads: {kv_heads} does not divide the draft's {heads} attention heads; try "
            f"{_divisor(heads, kv_heads)}"
        )
    if head_dim % 2:
        raise UserError(f"draft.head_dim: {head_dim}: RoPE turns pairs of columns; set an even number")
    if head_dim != target.head_dim and any(isinstance(v, list) for v in (target.rope["rope_scaling"] or {}).values()):
        raise UserError(
            f"draft.head_dim: {head_dim}: the target's RoPE has a factor for each pair of its {target.head_dim} "
            f"columns, which the draft shares; leave it out"
        )
    return DraftSize(heads, kv_heads, head_dim, intermediate, tuple(reasons))


def _heads(target: TargetShape, head_dim: int, reasons: list[str]) -> int:
    if not target.latent and target.hidden % target.heads == 0:
        return target.heads
    heads = _divisor(target.hidden, max(1, target.hidden // head_dim))
    if target.latent:
        why = "as wide as its hidden size, since a draft can't have its target's latent attention"
    else:
        why = f"since the target's {target.heads} do not divide its hidden size {target.hidden}"
    if heads != target.heads:
        reasons.append(f"{heads} heads of {head_dim}, {why}")
    return heads


def _kv_heads(target: TargetShape, heads: int, reasons: list[str]) -> int:
    if target.latent:
        kv_heads = _divisor(heads, _LATENT_KEY_HEADS)
        reasons.append(
            f"{kv_heads} key heads: the target computes its own from a latent, but a draft would have to cache them"
        )
        return kv_heads
    return target.kv_heads if heads % target.kv_heads == 0 else _divisor(heads, target.kv_heads)


def _intermediate(target: TargetShape, reasons: list[str]) -> int:
    if target.experts is None:
        return target.intermediate
    if target.experts.dense_first:
        reasons.append(f"an MLP of {target.intermediate}, as in the target's dense layers")
        return target.intermediate
    width = _EXPERTS_MLP * target.hidden
    reasons.append(
        f"an MLP of {width}, {_EXPERTS_MLP} times the hidden size as in published drafts for mixtures: the target's "
        f"{target.intermediate} is an expert's"
    )
    return width


def _divisor(of: int, most: int) -> int:
    """Return the largest divisor of ``of`` that is at most ``most``."""
    return next(count for count in range(min(of, most), 0, -1) if of % count == 0)

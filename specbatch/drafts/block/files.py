"""The files of DFlash and DSpark drafts (`specbatch.drafts.base.Files`).

Both engines read a checkpoint's plain form: Qwen3's keys, and the algorithm's own keys in ``dflash_config`` (DFlash) or
on top level (DSpark). Unlike EAGLE-3's, their layer ids are indices of layer outputs, from 0, in both engines.
``is_causal`` (whether slots see only earlier ones) and ``sample_from_anchor`` (whether the anchor's slot proposes) are
always written, since readers differ in their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specbatch.drafts.block.config import BlockDraft
from specbatch.drafts.block.memory import BlockShape
from specbatch.drafts.hf_keys import rope_keys, special_tokens
from specbatch.drafts.starting_draft import FIELD, check_target, read_config
from specbatch.errors import UserError
from specbatch.target import TargetShape
from specbatch.weights import Weights

if TYPE_CHECKING:
    import torch

Kind = Literal["dflash", "dspark"]
_ARCHITECTURES = {"dflash": ("DFlashDraftModel",), "dspark": ("Qwen3DSparkModel", "DSparkDraftModel")}
"""Architectures in checkpoints; the first one is written."""
_BORROWED = ("embed_tokens.weight", "lm_head.weight")
"""The target's tensors, which some published checkpoints contain."""


def shapes(shape: BlockShape) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a draft's parameters, as in published checkpoints."""
    hidden, query, key, intermediate = shape.hidden, shape.query, shape.key, shape.intermediate
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "self_attn.q_norm": (shape.head_dim,),
        "self_attn.k_norm": (shape.head_dim,),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    found: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, shape.aux_layers * hidden),
        "hidden_norm.weight": (hidden,),
        **{f"layers.{i}.{name}.weight": size for i in range(shape.layers) for name, size in layer.items()},
        "norm.weight": (hidden,),
    }
    if shape.markov_rank:
        pair = (shape.vocab, shape.markov_rank)
        found |= {"markov_head.markov_w1.weight": pair, "markov_head.markov_w2.weight": pair}
    if shape.confidence:
        found["confidence_head.proj.weight"] = (1, hidden + shape.markov_rank)
        found["confidence_head.proj.bias"] = (1,)
    return found


@dataclass(frozen=True)
class PublishedBlock:
    """A draft on disk that fits a run."""

    weights: Weights
    names: dict[str, str]
    """Maps our names of its parameters to those in its files."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class BlockFiles:
    """The files of a draft of this shape."""

    kind: Kind
    draft: BlockDraft
    target: TargetShape
    shape: BlockShape
    aux_layers: tuple[int, ...]

    def checkpoint(self, stored: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
        from specbatch.drafts.checkpoint import checked

        return checked(stored, shapes(self.shape), where)

    def hf_config(self, tensors: Mapping[str, torch.Tensor], *, target_name: str, draft_tokens: int) -> dict[str, Any]:
        target, shape = self.target, self.shape
        of_both = {
            "architectures": [_ARCHITECTURES[self.kind][0]],
            "model_type": "qwen3",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab,
            "max_position_embeddings": target.max_positions,
            "rms_norm_eps": target.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "layer_types": ["full_attention"] * shape.layers,
            "is_causal": False,
            "num_target_layers": target.layers,
            "block_size": shape.block_size,
            "sample_from_anchor": shape.first_slot == 0,
            **rope_keys(target),
            **special_tokens(target),
        }
        own = {"mask_token_id": self.draft.mask_token_id, "target_layer_ids": list(self.aux_layers)}
        if self.kind == "dflash":
            return of_both | {"dflash_config": own}
        return (
            of_both
            | own
            | {
                "markov_rank": shape.markov_rank,
                "markov_head_type": "vanilla",
                "enable_confidence_head": shape.confidence,
                "confidence_head_with_markov": shape.confidence and shape.markov_rank > 0,
            }
        )

    def serve(self, engine: str, draft_tokens: int) -> dict[str, Any] | None:
        sglang: dict[str, Any] = {"speculative_algorithm": self.kind.upper()}
        if draft_tokens != self.shape.proposals:
            sglang[f"speculative_{self.kind}_block_size"] = draft_tokens + self.shape.first_slot
        return {"sglang": sglang, "vllm": {"method": self.kind, "num_speculative_tokens": draft_tokens}}.get(engine)

    def starting_tensors(
        self, published: PublishedBlock, settings: Any, target_head: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {ours: published.weights.load(theirs) for ours, theirs in published.names.items()}

    def read_published(self) -> PublishedBlock:
        assert self.draft.init_from is not None
        folder = Path(self.draft.init_from).expanduser()
        settings = read_config(folder)
        self._refuse_other_kind(folder, settings)
        warnings = check_target(folder, settings, self.target) + self._compare(folder, settings)
        weights, expected = Weights(folder), shapes(self.shape)
        names: dict[str, str] = {}
        for theirs in weights.tensors:
            ours = theirs.removeprefix("model.")
            if ours in names:
                raise UserError(f"{FIELD}: {folder} has both {names[ours]} and {theirs}")
            if ours not in _BORROWED:
                names[ours] = theirs
        for ours in [*expected, *names]:
            if ours not in names:
                raise UserError(f"{FIELD}: {folder} has no tensor {ours}, which this run's {self.kind} has")
            if ours not in expected:
                raise UserError(f"{FIELD}: {folder} has a tensor {names[ours]}, which this run's {self.kind} does not")
            found = weights.tensors[names[ours]].shape
            if found != expected[ours]:
                hint = f"; set draft.intermediate_size: {found[0]}" if ours == "layers.0.mlp.gate_proj.weight" else ""
                raise UserError(
                    f"{FIELD}: {names[ours]} in {folder} is {list(found)}, and this run's is {list(expected[ours])}"
                    f"{hint}"
                )
        return PublishedBlock(weights, names, tuple(warnings))

    def _refuse_other_kind(self, folder: Path, settings: dict[str, Any]) -> None:
        named = settings.get("architectures") or []
        if not set(named) & set(_ARCHITECTURES[self.kind]):
            raise UserError(
                f"{FIELD}: {folder} is a {', '.join(named) or 'model without architectures'}, and draft.algorithm: "
                f"{self.kind} starts from a {_ARCHITECTURES[self.kind][0]}"
            )

    def _compare(self, folder: Path, settings: dict[str, Any]) -> list[str]:
        """Refuse a draft that differs from this run's in inputs or structure; return warnings."""
        own = {**settings, **(settings.get(f"{self.kind}_config") or {})}
        wanted = {
            "target_layer_ids": ("draft.aux_layers", list(self.aux_layers)),
            "num_hidden_layers": ("draft.num_layers", self.shape.layers),
            "mask_token_id": ("draft.mask_token_id", self.draft.mask_token_id),
        }
        if self.kind == "dspark":
            wanted["markov_rank"] = ("draft.markov_rank", self.shape.markov_rank)
        for key, (field, value) in wanted.items():
            if key in own and own[key] != value:
                raise UserError(
                    f"{FIELD}: {folder} has {key} {own[key]}, and this run {value}; set {field}: {own[key]}"
                )
        kinds = {kind for kind in settings.get("layer_types") or [] if kind != "full_attention"}
        if kinds or settings.get("is_causal"):
            raise UserError(
                f"{FIELD}: {folder} has {', '.join(sorted(kinds)) or 'causal'} layers; specbatch trains layers that "
                "see everything before a block, and the whole block"
            )
        block = own.get("block_size", self.shape.block_size)
        if block != self.shape.block_size:
            return [
                f"{FIELD}: {folder} was trained with blocks of {block}, and this run's draft.block_size is "
                f"{self.shape.block_size}"
            ]
        return []

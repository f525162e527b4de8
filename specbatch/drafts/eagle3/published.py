"""An existing EAGLE-3 draft, written by `specbatch export` or another trainer, that training can start from.

Names, shapes and the vocabulary map are checked from the files' headers, without torch, and so before anything
starts. Other names in published checkpoints are understood: ``midlayer`` for ``layers.0``, the prefix ``model.``, and
``aux_norm_low``, ``_mid`` and ``_high`` for the norms before the projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.sglang import outputs_of
from specbatch.drafts.starting_draft import FIELD, check_target, read_config
from specbatch.errors import UserError
from specbatch.target import TargetShape
from specbatch.weights import Weights

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_VARIANTS = ("norm_before_residual", "norm_before_fc", "attention_bias")
"""Keys that, if true, change what a draft computes in a way that is not supported here."""
_SWITCHES = {"fc_norm": ("fc_norm", "use_aux_norm"), "norm_output": ("norm_output",)}
"""Fields of ``draft``, and the keys with the same meaning in a published draft, older ones last."""
_OTHER_NAMES = {
    "midlayer.": "layers.0.", "aux_norm_low.": "fc_norm.0.", "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}  # fmt: skip
"""Maps prefixes of tensor names to ours."""


def shapes(shape: Shape, draft_vocab: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of an EAGLE-3 draft's parameters, as in published checkpoints.

    Args:
        draft_vocab: rows of its head.
    """
    hidden, query, key = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    intermediate = shape.intermediate
    layer = {
        "input_layernorm": (hidden,),
        "hidden_norm": (hidden,),
        "self_attn.q_proj": (query, 2 * hidden),
        "self_attn.k_proj": (key, 2 * hidden),
        "self_attn.v_proj": (key, 2 * hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    norms = range(shape.aux_layers) if shape.fc_norm else ()
    return {
        **{f"fc_norm.{number}.weight": (hidden,) for number in norms},
        "fc.weight": (hidden, shape.aux_layers * hidden),
        **{f"layers.0.{name}.weight": size for name, size in layer.items()},
        "norm.weight": (hidden,),
        HEAD: (draft_vocab, hidden),
    }


@dataclass(frozen=True)
class PublishedEagle3:
    """A draft on disk that fits a run."""

    weights: Weights
    names: dict[str, str]
    """Maps our names of its parameters to those in its files."""
    ids: np.ndarray
    """int64: the target's id of each row of its head."""
    warnings: tuple[str, ...]


def read_published(
    draft: Eagle3Draft, target: TargetShape, shape: Shape, aux_layers: tuple[int, ...]
) -> PublishedEagle3:
    """Read and check the draft that a run starts from.

    Raises:
        UserError: there is none, or this run can't continue with it.
    """
    assert draft.init_from is not None
    folder = Path(draft.init_from).expanduser()
    settings = read_config(folder)
    warnings = _compare(folder, settings, draft, target, aux_layers)
    weights = Weights(folder)
    names: dict[str, str] = {}
    for theirs in weights.tensors:
        ours = theirs.removeprefix("model.")
        for other, name in _OTHER_NAMES.items():
            ours = name + ours.removeprefix(other) if ours.startswith(other) else ours
        if ours in names:
            raise UserError(f"{FIELD}: {folder} has both {names[ours]} and {theirs}")
        names[ours] = theirs
    rows = weights.tensors[names[HEAD]].shape[0] if HEAD in names else 0
    expected = shapes(shape, rows)
    maps = {name: names.pop(name) for name in ("d2t", "t2d") if name in names}
    if EMBEDDING in names and draft.train_embedding:
        expected[EMBEDDING] = (target.vocab, target.hidden)
    elif EMBEDDING in names:
        del names[EMBEDDING]
        warnings.append(
            f"{FIELD}: the target's embedding is used, not the one in {folder}; if that was trained, set "
            "draft.train_embedding: true"
        )
    for ours in [*expected, *names]:
        if ours not in names:
            raise UserError(f"{FIELD}: {folder} has no tensor {ours}; it is not an EAGLE-3 draft of one layer")
        if ours not in expected:
            raise UserError(
                f"{FIELD}: {folder} has a tensor {names[ours]}, which this run's EAGLE-3 draft does not have"
            )
    for ours in expected:
        found = weights.tensors[names[ours]].shape
        if found != expected[ours]:
            hint = _hint(ours, settings, found)
            raise UserError(
                f"{FIELD}: {names[ours]} in {folder} is {list(found)}, and this run's is {list(expected[ours])}{hint}"
            )
    return PublishedEagle3(weights, names, _ids(weights, maps, rows, target.vocab, folder), tuple(warnings))


def _hint(name: str, settings: dict[str, Any], found: tuple[int, ...]) -> str:
    """Return a hint that says what to set so that a tensor of the layer fits."""
    if name == "layers.0.mlp.gate_proj.weight":
        return f"; set draft.intermediate_size: {found[0]}"
    keys = ("num_attention_heads", "num_key_value_heads", "head_dim")
    if ".self_attn." in name and any(settings.get(key) for key in keys):
        return "; set " + ", ".join(f"draft.{key}: {settings[key]}" for key in keys if settings.get(key))
    return ""


def starting_tensors(
    published: PublishedEagle3, draft_ids: tuple[int, ...], target_head: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the parameters to start with, by our names, as stored.

    Args:
        draft_ids: target ids of the run's draft vocabulary. For ids that the published draft lacks, rows of the head
            are the target's.
        target_head: ``[vocabulary, hidden]``.
    """
    import torch

    tensors = {ours: published.weights.load(theirs) for ours, theirs in published.names.items()}
    row_of = np.full(target_head.shape[0], -1, dtype=np.int64)
    row_of[published.ids] = np.arange(len(published.ids))
    wanted = np.array(draft_ids, dtype=np.int64)
    rows = torch.from_numpy(row_of[wanted])
    head = target_head[torch.from_numpy(wanted)].float()
    head[rows >= 0] = tensors[HEAD][rows[rows >= 0]].float()
    return tensors | {HEAD: head}


def _compare(
    folder: Path, settings: dict[str, Any], draft: Eagle3Draft, target: TargetShape, aux_layers: tuple[int, ...]
) -> list[str]:
    """Refuse a draft for another target or of another kind; return warnings."""
    eagle = settings.get("eagle_config") or {}
    warnings = check_target(folder, settings, target)
    variant = next((key for key in _VARIANTS if settings.get(key) or eagle.get(key)), None)
    if variant:
        raise UserError(f"{FIELD}: {folder} says {variant}: true, which specbatch's EAGLE-3 does not support")
    for field, keys in _SWITCHES.items():
        said = next((key for key in keys if settings.get(key) or eagle.get(key)), None)
        if bool(said) != getattr(draft, field):
            says = f"says {said}: true" if said else f"does not say {field}: true"
            raise UserError(f"{FIELD}: {folder} {says}; set draft.{field}: {'true' if said else 'false'}")
    read, layers = _layers(settings, eagle, target.architecture), list(aux_layers)
    if read is not None and read != layers:
        raise UserError(
            f"{FIELD}: {folder} reads the outputs of the target's layers {read}, and this run captures {layers}; set "
            f"draft.aux_layers: {read}"
        )
    return warnings


def _layers(settings: dict[str, Any], eagle: dict[str, Any], architecture: str) -> list[int] | None:
    """Return the layers whose outputs a draft reads, if it names them: by SGLang's ids, else by vLLM's, which are
    one more."""
    if eagle.get("eagle_aux_hidden_state_layer_ids"):
        return outputs_of(architecture, eagle["eagle_aux_hidden_state_layer_ids"])
    after = settings.get("eagle_aux_hidden_state_layer_ids")
    return [layer - 1 for layer in after] if after else None


def _ids(weights: Weights, maps: dict[str, str], rows: int, vocab: int, folder: Path) -> np.ndarray:
    """Return the target's id of each row of the head, from ``d2t``."""
    if "d2t" not in maps:
        if rows != vocab:
            raise UserError(f"{FIELD}: {folder} has no d2t, and its head has {rows} rows for {vocab} tokens")
        return np.arange(vocab)
    offsets = weights.load_numpy(maps["d2t"])
    if offsets.shape != (rows,):
        raise UserError(f"{FIELD}: d2t in {folder} is {list(offsets.shape)}, and its head has {rows} rows")
    ids = np.arange(rows) + offsets.astype(np.int64)
    if ids.min() < 0 or ids.max() >= vocab or len(np.unique(ids)) != rows:
        raise UserError(f"{FIELD}: d2t in {folder} does not give {rows} different tokens of the target's {vocab}")
    if "t2d" in maps and not np.array_equal(np.flatnonzero(weights.load_numpy(maps["t2d"])), np.sort(ids)):
        raise UserError(f"{FIELD}: d2t and t2d in {folder} do not name the same tokens")
    return ids

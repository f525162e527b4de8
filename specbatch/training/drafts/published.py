"""An EAGLE-3 draft that is there already, as `specbatch export` or others wrote it: where training may start from.

Names, shapes and the map of the vocabulary are checked from the files' headers, without torch, so before anything
starts. Other names of published checkpoints are understood: ``midlayer`` for ``layers.0``, and ``model.`` in front.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.target import TargetShape, aux_layers, fingerprint
from specbatch.weights import INDEX, SINGLE, Weights

if TYPE_CHECKING:
    import torch

FIELD = "draft.init_from"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "use_aux_norm", "attention_bias")
"""Keys of drafts that compute something else, if they are true."""


def shapes(target: TargetShape, aux_states: int, intermediate: int, draft_vocab: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an EAGLE-3 draft's parameters, as published checkpoints have them.

    Args:
        aux_states: how many hidden states of the target it reads.
        intermediate: width of its MLP.
        draft_vocab: rows of its head.
    """
    hidden, query, key = target.hidden, target.heads * target.head_dim, target.kv_heads * target.head_dim
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
    return {
        "fc.weight": (hidden, aux_states * hidden),
        **{f"layers.0.{name}.weight": shape for name, shape in layer.items()},
        "norm.weight": (hidden,),
        HEAD: (draft_vocab, hidden),
    }


@dataclass(frozen=True)
class Published:
    """A draft on disk that fits a run."""

    weights: Weights
    names: dict[str, str]
    """Our names of its parameters, and those in its files."""
    ids: np.ndarray
    """int64: the target's id of each row of its head."""
    warnings: tuple[str, ...]


def read_published(config: Config, target: TargetShape) -> Published:
    """Look at the draft that a run starts from.

    Raises:
        UserError: there is none, or it is not one that this run could go on with.
    """
    assert config.draft.init_from is not None
    folder = Path(config.draft.init_from).expanduser()
    settings = _settings(folder)
    warnings = _compare(folder, settings, config, target)
    weights = Weights(folder)
    names: dict[str, str] = {}
    for theirs in weights.tensors:
        ours = theirs.removeprefix("model.").replace("midlayer.", "layers.0.")
        if ours in names:
            raise UserError(f"{FIELD}: {folder} has both {names[ours]} and {theirs}")
        names[ours] = theirs
    rows = weights.tensors[names[HEAD]].shape[0] if HEAD in names else 0
    intermediate = config.draft.intermediate_size or target.intermediate
    expected = shapes(target, len(aux_layers(config, target)), intermediate, rows)
    maps = {name: names.pop(name) for name in ("d2t", "t2d") if name in names}
    if EMBEDDING in names and config.draft.train_embedding:
        expected[EMBEDDING] = (target.vocab, target.hidden)
    elif EMBEDDING in names:
        del names[EMBEDDING]
        warnings.append(
            f"{FIELD}: the embedding in {folder} is not used, but the target's; if it was trained, set "
            "draft.train_embedding: true"
        )
    for ours in [*expected, *names]:
        if ours not in names:
            raise UserError(f"{FIELD}: {folder} has no tensor {ours}; it is no EAGLE-3 draft of one layer")
        if ours not in expected:
            raise UserError(
                f"{FIELD}: {folder} has a tensor {names[ours]}, which the EAGLE-3 that is trained here does not"
            )
        found = weights.tensors[names[ours]].shape
        if found != expected[ours]:
            hint = f"; set draft.intermediate_size: {found[0]}" if ours == "layers.0.mlp.gate_proj.weight" else ""
            raise UserError(
                f"{FIELD}: {names[ours]} in {folder} is {list(found)}, and this run's is {list(expected[ours])}{hint}"
            )
    return Published(weights, names, _ids(weights, maps, rows, target.vocab, folder), tuple(warnings))


def starting_tensors(
    published: Published, draft_ids: tuple[int, ...], target_head: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The parameters to start with, by our names, as stored.

    Args:
        draft_ids: target ids of the run's draft vocabulary. Rows of the head for those that the published draft does
            not have are the target's.
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


def _settings(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(
            f"{FIELD}: there is no directory {folder}; download a draft of the hub with `hf download` first"
        )
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        hint = ""
        if (folder / "pytorch_model.bin").is_file():
            hint = (
                '; convert its pytorch_model.bin: python -c "import torch, safetensors.torch as s; '
                "s.save_file(torch.load('pytorch_model.bin', weights_only=True), 'model.safetensors')\""
            )
        raise UserError(f"{FIELD}: {folder} has no {SINGLE}{hint}")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{FIELD}: {folder} has no config.json: not the directory of a draft") from None
    except ValueError as error:
        raise UserError(f"{FIELD}: {folder / 'config.json'} is not JSON: {error}") from error
    return {**(settings.get("transformer_layer_config") or {}), **settings}


def _compare(folder: Path, settings: dict[str, Any], config: Config, target: TargetShape) -> list[str]:
    """Refuse a draft for another target or of another kind; returns warnings."""
    eagle = settings.get("eagle_config") or {}
    for key, value in (("vocab_size", target.vocab), ("hidden_size", target.hidden)):
        if settings.get(key) != value:
            raise UserError(
                f"{FIELD}: {folder} is a draft for another target: its {key} is {settings.get(key)}, and that of "
                f"{target.path} is {value}"
            )
    variant = next((key for key in _VARIANTS if settings.get(key) or eagle.get(key)), None)
    if variant:
        raise UserError(f"{FIELD}: {folder} says {variant}: true, which the EAGLE-3 that is trained here does not know")
    read, layers = _layers(settings, eagle), list(aux_layers(config, target))
    if read is not None and read != layers:
        raise UserError(
            f"{FIELD}: {folder} reads the outputs of the target's layers {read}, and this run captures {layers}; set "
            f"draft.aux_layers: {read}"
        )
    warnings = []
    theta = (settings.get("rope_parameters") or {}).get("rope_theta", settings.get("rope_theta"))
    if theta is not None and float(theta) != target.rope["rope_theta"]:
        warnings.append(
            f"{FIELD}: {folder} was trained with rope_theta {theta:g} and goes on with the target's "
            f"{target.rope['rope_theta']:g}"
        )
    about = folder / "specbatch.json"
    if about.is_file() and json.loads(about.read_text()).get("target_fingerprint") != fingerprint(target):
        warnings.append(
            f"{FIELD}: {folder} was trained for other weights or another config.json than those of {target.path}"
        )
    return warnings


def _layers(settings: dict[str, Any], eagle: dict[str, Any]) -> list[int] | None:
    """Layers whose outputs a draft reads, where it says so: SGLang's numbers, else vLLM's, which are one more."""
    if eagle.get("eagle_aux_hidden_state_layer_ids"):
        return list(eagle["eagle_aux_hidden_state_layer_ids"])
    after = settings.get("eagle_aux_hidden_state_layer_ids")
    return [layer - 1 for layer in after] if after else None


def _ids(weights: Weights, maps: dict[str, str], rows: int, vocab: int, folder: Path) -> np.ndarray:
    """The target's id of each row of the head, by ``d2t``."""
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

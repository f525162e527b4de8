"""A published draft on disk: its algorithm, and whether it fits a target."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from specbatch.config import Config, Draft
from specbatch.config.algorithms import algorithm_names, draft_section
from specbatch.errors import UserError
from specbatch.target import TargetShape
from specbatch.weights import INDEX, SINGLE, Weights


def check_draft(folder: Path, shape: TargetShape) -> dict[str, Any]:
    """Check the files of a draft, which SGLang would fill with random tensors, or fail on after minutes.

    Returns:
        its config.json.

    Raises:
        UserError: it is not a draft, or is one for another target.
    """
    weights = [name for name in (SINGLE, INDEX, "pytorch_model.bin") if (folder / name).is_file()]
    missing = None if (folder / "config.json").is_file() else "config.json"
    missing = missing or (None if weights else SINGLE)
    if missing:
        raise UserError(f"{folder} has no {missing}: not the directory of a draft")
    try:
        found = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from error
    inner = found.get("transformer_layer_config") or {}
    width = found.get("target_hidden_size") or found.get("hidden_size", inner.get("hidden_size"))
    if found.get("num_aux_hidden_states") == 1:  # all states as one: a draft with an embedding of its own
        width = found.get("hidden_size")
    for name, has, value in (
        ("vocab_size", found.get("vocab_size", inner.get("vocab_size")), shape.vocab),
        ("target_hidden_size", width, shape.hidden),
    ):
        if has != value:
            raise UserError(
                f"{folder / 'config.json'}: {name} is {has}, but the target {shape.path} has {value}: it is a draft "
                "for another target"
            )
    read = _layers(found)
    if read and max(read) > shape.layers:
        raise UserError(
            f"{folder / 'config.json'}: it reads the outputs of layers {', '.join(map(str, read))}, and the target "
            f"{shape.path} has {shape.layers}: it is a draft for another target"
        )
    if weights[0] != "pytorch_model.bin":
        _check_projection(folder, shape)
    return dict(found)


def config_of(folder: Path, found: dict[str, Any], base: Config) -> Config:
    """The configuration of a measurement without a run: its ``draft`` section is what the draft's files say.

    Args:
        found: the draft's config.json.
        base: gives the other sections.

    Raises:
        UserError: its algorithm is unknown here.
    """
    kind = kind_of(folder, found)
    section = draft_section(kind)
    given: dict[str, Any] = {"init_from": str(folder)}
    fields = {entry.name for entry in dataclasses.fields(section)}
    if "block_size" in fields:
        own = {**(found.get("transformer_layer_config") or {}), **found, **(found.get(f"{kind}_config") or {})}
        told = {
            "num_layers": own.get("num_hidden_layers"),
            "block_size": own.get("block_size"),
            "mask_token_id": own.get("mask_token_id"),
            "aux_layers": _layers(found) or None,
        }
        given |= {name: value for name, value in told.items() if name in fields and value is not None}
    draft: Draft = section(**given)
    return dataclasses.replace(base, draft=draft)


def kind_of(folder: Path, found: dict[str, Any]) -> str:
    """The name of a draft's algorithm, which is a part of the name of its class or form.

    Raises:
        UserError: it is unknown here.
    """
    named = [str(found.get("speculators_model_type") or ""), *map(str, found.get("architectures") or [])]
    for name in named:
        for kind in algorithm_names():
            if kind in name.lower():
                return kind
    told = ", ".join(filter(None, named)) or "nothing"
    raise UserError(
        f"{folder / 'config.json'}: its architectures are {told}; drafts that can be measured are of the "
        f"algorithms {', '.join(algorithm_names())}"
    )


def _layers(found: dict[str, Any]) -> list[int]:
    """Numbers of the target's layers that a draft reads, as its config.json has them; empty if it does not."""
    places = (found, found.get("eagle_config") or {}, found.get("dflash_config") or {})
    names = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "target_layer_ids")
    return next((list(place[name]) for place in places for name in names if place.get(name)), [])


def _check_projection(folder: Path, shape: TargetShape) -> None:
    """Check that the draft's projection reads a whole number of the target's states."""
    fc = Weights(folder).tensors.get("fc.weight")
    if fc is not None and len(fc.shape) == 2 and fc.shape[1] % shape.hidden:
        raise UserError(
            f"{folder}: fc.weight reads {fc.shape[1]} values, which is not a multiple of the target's hidden size "
            f"{shape.hidden}: it is a draft for another target"
        )

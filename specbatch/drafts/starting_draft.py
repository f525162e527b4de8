"""Reads a draft on disk that a run starts from; the part that all algorithms share.

Only the files' headers are read, without torch, so it is checked before anything starts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specbatch.errors import UserError
from specbatch.target import TargetShape, fingerprint
from specbatch.weights import INDEX, SINGLE

FIELD = "draft.init_from"


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a draft's directory.

    Raises:
        UserError: it is not the directory of a draft.
    """
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
    if not isinstance(settings, dict):
        raise UserError(f"{FIELD}: {folder / 'config.json'} is not a JSON object")
    return {**(settings.get("transformer_layer_config") or {}), **settings}


def check_target(folder: Path, settings: dict[str, Any], target: TargetShape) -> list[str]:
    """Refuse a draft for another target; return warnings.

    Raises:
        UserError: vocabulary or width differ from the target's.
    """
    for key, value in (("vocab_size", target.vocab), ("hidden_size", target.hidden)):
        if settings.get(key) != value:
            raise UserError(
                f"{FIELD}: {folder} is a draft for another target: its {key} is {settings.get(key)}, but that of "
                f"{target.path} is {value}"
            )
    warnings = []
    theta = (settings.get("rope_parameters") or {}).get("rope_theta", settings.get("rope_theta"))
    if theta is not None and float(theta) != target.rope["rope_theta"]:
        warnings.append(
            f"{FIELD}: {folder} was trained with rope_theta {theta:g} and continues with the target's "
            f"{target.rope['rope_theta']:g}"
        )
    about = folder / "specbatch.json"
    if about.is_file() and json.loads(about.read_text()).get("target_fingerprint") != fingerprint(target):
        warnings.append(
            f"{FIELD}: {folder} was trained for other weights or another config.json than those of {target.path}"
        )
    return warnings

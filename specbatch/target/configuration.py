"""Reads config.json of a target: the part that describes its language model, completed by defaults.

Files omit values that are the default of their class, especially in nested parts. Missing values come from
transformers' class for the model, so none is invented. A file with all required values is read without transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specbatch.errors import UserError

CONTEXT_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
"""Keys of the longest context, in SGLang's order."""
_NESTED = ("thinker_config", "llm_config", "language_config", "text_config")
"""Keys under which multimodal models describe their language model, in SGLang's order."""
_NEEDED = (
    ("hidden_size", "n_embd"),
    ("num_attention_heads", "n_head"),
    ("num_hidden_layers", "n_layer"),
    ("vocab_size",),
    ("num_key_value_heads",),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    CONTEXT_KEYS,
)
"""Groups of keys: config.json must have at least one key of each group."""


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no file.

    Raises:
        UserError: it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def language_part(top: dict[str, Any]) -> dict[str, Any]:
    """Return the part that describes the language model, as in the file."""
    for key in _NESTED:
        if isinstance(top.get(key), dict):
            return language_part(top[key])
    return top


def language_config(path: Path, top: dict[str, Any], *, complete: bool = False) -> dict[str, Any]:
    """Return the description of the language model, merged over the defaults of its class.

    Args:
        path: path of the file, for messages.
        top: content of the file.
        complete: always use defaults of the class, also for values that `specbatch.target.TargetShape` does not need.

    Raises:
        UserError: transformers' class does not accept the file.
    """
    text = language_part(top)
    if not complete and text is top and _says_enough(top):
        return text
    # The class keeps a null of the file, which means a default for some keys.
    return {
        **text,
        **_class_defaults(path, top, text),
        **{key: value for key, value in text.items() if value is not None},
    }


def theta_of(text: dict[str, Any]) -> float | None:
    """Return ``rope_theta`` of either schema: at the top, or in the blocks of ``rope_parameters``."""
    return _number(full_attention_rope(text).get("rope_theta")) or _number(text.get("rope_theta"))


def full_attention_rope(text: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE block for layers with full attention, like the draft's; empty if the file has none."""
    parameters = text.get("rope_parameters") or {}
    if layered(text):
        parameters = parameters.get("full_attention") or next(iter(parameters.values()))
    return dict(parameters or text.get("rope_scaling") or {})


def layered(text: dict[str, Any]) -> bool:
    """Return whether there is a RoPE block for each kind of layer."""
    parameters = text.get("rope_parameters") or {}
    return bool(parameters) and all(isinstance(value, dict) for value in parameters.values())


def _says_enough(text: dict[str, Any]) -> bool:
    known = all(any(text.get(key) is not None for key in keys) for keys in _NEEDED)
    return known and isinstance(text.get("tie_word_embeddings"), bool) and theta_of(text) is not None


def _class_defaults(path: Path, top: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' configuration of the language model; empty for a class that only the target's code
    defines."""
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    for part in (top, text):
        kind = part.get("model_type")
        if kind not in CONFIG_MAPPING:
            continue
        arguments = {key: value for key, value in part.items() if key not in ("model_type", "transformers_version")}
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            made = CONFIG_MAPPING[kind](**arguments).to_dict()
        except Exception as error:  # checks of its own kind in each class
            why = " ".join(str(error).split())
            raise UserError(f"{path}: transformers' class for model_type: {kind} rejects it: {why}") from error
        finally:
            logging.set_verbosity(before)
        return language_part(made)
    return {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

"""Stores values of a snapshot that are not tensors as JSON: numbers, texts, and lists and tuples of them.

torch.distributed.checkpoint hands such values over as pickles, which are programs. They are read with torch's
restricted unpickler when a snapshot is written, stored as JSON, and never unpickled from a file.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import torch


def encode(value: Any) -> Any:
    """Convert a value to a JSON form that is exact for every float and keeps tuples.

    Raises:
        TypeError: it is not None, bool, 64-bit int, float, str, bytes, or a list, tuple or dict of these.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    raise TypeError(f"a snapshot can't hold {value!r} of type {type(value).__name__}")


def decode(value: Any) -> Any:
    """Return the value that `encode` was given.

    Raises:
        ValueError: `encode` never returns this.
    """
    match value:
        case {"float": str(text)}:
            return float(text)
        case {"bytes": str(text)}:
            return bytes.fromhex(text)
        case {"tuple": list(items)}:
            return tuple(decode(item) for item in items)
        case {"dict": dict(items)}:
            return {key: decode(item) for key, item in items.items()}
        case dict():
            raise ValueError(f"a snapshot has no value like {value!r}")
        case list():
            return [decode(item) for item in value]
    return value


def from_torch(name: str, data: io.BytesIO) -> Any:
    """Return the JSON form of a value that a planner has pickled.

    Raises:
        TypeError: `encode` does not support the value; names it.
    """
    data.seek(0)
    try:
        return encode(torch.load(data, weights_only=True))
    except (TypeError, pickle.UnpicklingError) as error:
        raise TypeError(f"{name}: {error}") from error


def to_torch(value: Any) -> io.BytesIO:
    """Convert the JSON form of a value to the form that torch's planner reads."""
    data = io.BytesIO()
    torch.save(decode(value), data)
    data.seek(0)
    return data

"""What a snapshot holds beside tensors, as JSON: numbers, words, and lists and tuples of them.

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
    """A value as what JSON can say; exact for every float, and tuples stay tuples.

    Raises:
        TypeError: for anything but None, bool, int of 64 bits, float, str, bytes, list, tuple and dict of these.
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
    """What `encode` was given.

    Raises:
        ValueError: for what `encode` never gives.
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
    """The JSON form of a value that a planner has pickled.

    Raises:
        TypeError: naming the value, if it is none of those that `encode` takes.
    """
    data.seek(0)
    try:
        return encode(torch.load(data, weights_only=True))
    except (TypeError, pickle.UnpicklingError) as error:
        raise TypeError(f"{name}: {error}") from error


def to_torch(value: Any) -> io.BytesIO:
    """What a planner unpickles, made here from a value's JSON form."""
    data = io.BytesIO()
    torch.save(decode(value), data)
    data.seek(0)
    return data

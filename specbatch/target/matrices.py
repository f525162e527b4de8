"""Finds and loads embedding and head of a target."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from specbatch.errors import UserError

if TYPE_CHECKING:
    import torch

    from specbatch.target import TargetShape
    from specbatch.weights import Weights

HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "word_embeddings.weight")
_PREDICTION = re.compile(r"(^|\.)(layers\.\d+|mtp)\.")
"""Matches prediction layers, which contain copies of the model's embedding and head."""
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def embedding(shape: TargetShape) -> torch.Tensor:
    """Load the token embedding, ``[vocab, hidden]``, in the stored dtype, to the CPU.

    Raises:
        UserError: if it is missing or of another shape.
    """
    return _load_matrix(shape, embedding_name(shape))


def lm_head(shape: TargetShape) -> torch.Tensor:
    """Load the head, ``[vocab, hidden]``, in the stored dtype, to the CPU; the embedding if the two are tied.

    Raises:
        UserError: if it is missing or of another shape.
    """
    return _load_matrix(shape, head_name(shape))


def head_bias(shape: TargetShape) -> torch.Tensor | None:
    """Load the bias of the head, ``[vocab]``, in the stored dtype, to the CPU; None for most targets.

    Raises:
        UserError: it has another shape.
    """
    name = bias_name(shape)
    if name is None:
        return None
    found = shape.weights.tensors[name].shape
    if len(found) != 1 or found[0] < shape.vocab:
        raise UserError(f"{shape.path}: {name} is {list(found)}, config.json says {[shape.vocab]}")
    return shape.weights.load(name)[: shape.vocab]


def bias_name(shape: TargetShape) -> str | None:
    """Return the name of the head's bias; None for most targets."""
    return _own(shape.weights, "lm_head.bias")


def embedding_name(shape: TargetShape) -> str:
    """Return the name of the embedding's tensor, which may have more rows than the vocabulary: padding at the end.

    Raises:
        UserError: it can't be determined.
    """
    tensors = shape.weights.tensors
    named = [
        name
        for name in tensors
        if (name.split(".", 1)[-1].endswith(_EMBEDDINGS) or name in _EMBEDDINGS) and not _PREDICTION.search(name)
    ]
    fitting = [name for name in named if _fits(shape, tensors[name].shape)]
    if len(fitting) == 1:
        return fitting[0]
    if not named:
        raise UserError(f"{shape.path}: no tensor embed_tokens.weight in {_files(shape)}; specbatch needs it")
    found = ", ".join(f"{name} {list(tensors[name].shape)}" for name in fitting or named)
    rows = [shape.vocab, shape.hidden]
    raise UserError(f"{shape.path}: which tensor is the embedding, {rows} by config.json? Found {found}")


def head_name(shape: TargetShape) -> str:
    """Return the name of the tensor that serves as the head: the embedding's if the two are tied.

    Raises:
        UserError: the target is untied and has no head.
    """
    if shape.tied:
        return embedding_name(shape)
    stored = stored_head(shape)
    if stored is None:
        raise UserError(
            f"{shape.path}: config.json says tie_word_embeddings: false, but there is no tensor {HEAD} in "
            f"{_files(shape)}; if the target's head is its embedding, set tie_word_embeddings: true there, else "
            "download the missing file"
        )
    return stored


def stored_head(shape: TargetShape) -> str | None:
    """Return the name of the head's tensor in the files, even if a tied target does not use it."""
    return _own(shape.weights, HEAD)


def head_dtype(weights: Weights) -> str | None:
    """Return the dtype of the stored head, or else of the embedding: ``bfloat16``, ``float16`` or ``float32``; None if
    neither exists, or it has another dtype."""
    name = _own(weights, HEAD) or next((n for n in weights.tensors if n.endswith(_EMBEDDINGS)), None)
    return _FLOATS.get(weights.tensors[name].dtype) if name else None


def _own(weights: Weights, name: str) -> str | None:
    """Return the full name of a tensor of the model itself; the shortest if several have the same ending."""
    names = [full for full in weights.tensors if full == name or full.endswith(f".{name}")]
    return min((full for full in names if not _PREDICTION.search(full)), key=len, default=None)


def _fits(shape: TargetShape, found: tuple[int, ...]) -> bool:
    return len(found) == 2 and found[0] >= shape.vocab and found[1] == shape.hidden


def _load_matrix(shape: TargetShape, name: str) -> torch.Tensor:
    stored = shape.weights.tensors[name]
    if not _fits(shape, stored.shape):
        raise UserError(
            f"{stored.file}: {name} is {list(stored.shape)}, config.json says {[shape.vocab, shape.hidden]}"
        )
    if stored.dtype not in _FLOATS:
        raise UserError(f"{stored.file}: {name} is stored as {stored.dtype}; the loss needs it as BF16, F16 or F32")
    return shape.weights.load(name)[: shape.vocab]


def _files(shape: TargetShape) -> str:
    names = sorted(shape.weights.files)
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"

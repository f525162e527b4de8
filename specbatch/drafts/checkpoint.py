"""Checks each tensor of a draft before it goes into a checkpoint.

Engines silently drop names that they do not know, and initialize missing parameters at random.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specbatch.errors import RunError

DRAFT_IDS = "draft_ids"
"""Name of a tensor in a snapshot: int64, the target's id of each token of the draft's vocabulary."""


def checked(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, torch.Tensor]:
    """Return the tensors in bfloat16, in the order of ``expected``.

    Args:
        expected: names and shapes.
        where: name of their source, for errors.

    Raises:
        RunError: a tensor is missing, unexpected, not finite, or has another shape.
    """
    for name in [*expected, *found]:
        if name not in found:
            raise RunError(f"{where}: the draft has no tensor {name}")
        if name not in expected:
            raise RunError(f"{where}: the draft has a tensor {name} that no engine loads")
        if tuple(found[name].shape) != expected[name]:
            raise RunError(f"{where}: tensor {name} is {list(found[name].shape)}, not {list(expected[name])}")
    tensors = {name: found[name].to(torch.bfloat16).contiguous() for name in expected}
    for name, tensor in tensors.items():
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            raise RunError(f"{where}: tensor {name} has {wrong} values that are not finite in bfloat16")
    return tensors


def vocabulary_maps(ids: torch.Tensor, vocab: int, where: str) -> dict[str, torch.Tensor]:
    """Return ``d2t``, int64 ``[draft vocabulary]``, and ``t2d``, bool ``[vocab]``; empty if the vocabulary is the
    target's, since engines treat them as unknown parameters then.

    Raises:
        RunError: the ids are not a vocabulary of the target.
    """
    if ids.dtype != torch.int64 or ids.ndim != 1 or not ids.numel():
        raise RunError(f"{where}: {DRAFT_IDS} is {ids.dtype} {list(ids.shape)}, not a list of int64")
    if int(ids[0]) < 0 or int(ids[-1]) >= vocab or not bool((ids[1:] > ids[:-1]).all()):
        raise RunError(f"{where}: {DRAFT_IDS} are not ascending ids of the target's {vocab} tokens, each once")
    if len(ids) == vocab:
        return {}
    return {
        "d2t": ids - torch.arange(len(ids)),
        "t2d": torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True),
    }

"""The tensors of a draft under the names that engines load, checked one by one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from specbatch.errors import RunError
from specbatch.snapshot.folder import read_manifest
from specbatch.snapshot.reading import read_tensors
from specbatch.target import TargetShape
from specbatch.training.drafts import files
from specbatch.training.drafts.published import EMBEDDING

DRAFT_IDS = "draft_ids"
"""In a snapshot: int64, the target's id of each of the draft's tokens."""
NOT_THE_DRAFT = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.", "random.")
"""What names of the rest of a snapshot start with."""


def read_draft(snapshot: Path) -> dict[str, torch.Tensor]:
    """All tensors of a snapshot that are the draft's.

    Raises:
        DamagedSnapshot: naming file and tensor.
    """
    names = [name for name in read_manifest(snapshot).tensors if not name.startswith(NOT_THE_DRAFT)]
    return read_tensors(snapshot, names)


def draft_tensors(
    stored: dict[str, torch.Tensor],
    target: TargetShape,
    aux_states: int,
    intermediate: int,
    *,
    algorithm: str,
    where: str,
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors: parameters in bfloat16, ``d2t`` int64 ``[draft vocabulary]``, ``t2d`` bool ``[vocab]``.

    The last two only where the vocabulary is pruned: engines take them for unknown parameters otherwise.

    Args:
        stored: the draft of a snapshot.
        aux_states: how many hidden states the draft reads.
        intermediate: width of its MLP.
        algorithm: the draft's.
        where: what to call the snapshot in errors.

    Raises:
        RunError: if a tensor is missing, too many, of another shape, not finite, or the vocabulary is impossible.
    """
    ids = stored.get(DRAFT_IDS, torch.arange(target.vocab))
    _check_ids(ids, target.vocab, where)
    expected = files(algorithm).shapes(target, aux_states, intermediate, len(ids))
    if EMBEDDING in stored:
        expected[EMBEDDING] = (target.vocab, target.hidden)
    found = {name: tensor for name, tensor in stored.items() if name != DRAFT_IDS}
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
    if len(ids) < target.vocab:
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(target.vocab, dtype=torch.bool).index_fill_(0, ids, True)
    return tensors


def _check_ids(ids: torch.Tensor, vocab: int, where: str) -> None:
    if ids.dtype != torch.int64 or ids.ndim != 1 or not ids.numel():
        raise RunError(f"{where}: {DRAFT_IDS} is {ids.dtype} {list(ids.shape)}, not a list of int64")
    if int(ids[0]) < 0 or int(ids[-1]) >= vocab or not bool((ids[1:] > ids[:-1]).all()):
        raise RunError(f"{where}: {DRAFT_IDS} are not ascending ids of the target's {vocab} tokens, each once")


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that others may read, and wait for the disk."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""Reads a draft's tensors from a snapshot, and writes them into a safetensors file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from specbatch.snapshot.manifest import read_manifest
from specbatch.snapshot.reading import read_tensors

NOT_THE_DRAFT = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.", "random.")
"""Prefixes of names in a snapshot that do not belong to the draft."""


def read_draft(snapshot: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the draft in a snapshot.

    Raises:
        DamagedSnapshot: the snapshot is damaged; names file and tensor.
    """
    names = [name for name in read_manifest(snapshot).tensors if not name.startswith(NOT_THE_DRAFT)]
    return read_tensors(snapshot, names)


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that other users may read, and wait until it is on disk."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

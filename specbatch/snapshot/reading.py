"""Snapshots outside training: one process, no process group, everything checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from specbatch.snapshot.chunks import chunk_files, dtype_of, part
from specbatch.snapshot.manifest import DamagedSnapshot, read_manifest


def read_tensors(snapshot: Path, names: Iterable[str] | None = None, prefix: str = "") -> dict[str, torch.Tensor]:
    """Whole tensors of a snapshot, joined from the shards of all ranks.

    Args:
        names: which ones; all if not given. Names that the snapshot lacks are left out.
        prefix: only names that start so.

    Returns:
        name to tensor, as stored, in host memory.

    Raises:
        DamagedSnapshot: naming file and tensor.
    """
    return dict(each_tensor(snapshot, names, prefix))


def each_tensor(
    snapshot: Path, names: Iterable[str] | None = None, prefix: str = ""
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what `read_tensors` returns, one at a time, in the order of their names if those are given."""
    manifest = read_manifest(snapshot)
    with chunk_files(snapshot) as files:
        for name in manifest.tensors if names is None else names:
            stored = manifest.tensors.get(name)
            if stored is None or not name.startswith(prefix):
                continue
            tensor = torch.empty(stored.size, dtype=dtype_of(stored.dtype))
            missing = tensor.numel()
            for chunk in stored.chunks:
                stored_part = files.read(name, tensor.dtype, chunk)
                tensor[part(chunk.offset, chunk.size)] = stored_part
                missing -= stored_part.numel()
            if missing:
                raise DamagedSnapshot(f"{snapshot}: tensor {name} lacks {missing} values")
            yield name, tensor


def damage(snapshot: Path) -> Iterator[str]:
    """Read a snapshot completely; yields a sentence for each part that differs from what was written."""
    try:
        manifest = read_manifest(snapshot)
    except DamagedSnapshot as error:
        yield str(error)
        return
    with chunk_files(snapshot) as files:
        for name, stored in manifest.tensors.items():
            for chunk in stored.chunks:
                try:
                    files.read(name, dtype_of(stored.dtype), chunk)
                except DamagedSnapshot as error:
                    yield str(error)

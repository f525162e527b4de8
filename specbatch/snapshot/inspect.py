"""Reads an HDF5 file or folder of specbatch: its contents, and whether they are undamaged.

A snapshot is checked against its manifest; a single file of a snapshot or a recording, against the checksum next to
each of its datasets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.snapshot.chunks import dtype_of
from specbatch.snapshot.manifest import MANIFEST, DamagedSnapshot, read_manifest
from specbatch.snapshot.reading import damage
from specbatch.snapshot.recording import ABOUT


@dataclass
class Tensor:
    """One tensor of a snapshot, or one dataset of a file."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int


@dataclass
class Inspected:
    """The contents of a path."""

    path: str
    kind: str
    """``snapshot``, ``snapshot file``, ``recording`` or ``unreadable``."""
    bytes: int
    about: dict[str, Any] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    """Names of damaged parts; empty if there are none."""


def inspect(path: Path) -> list[Inspected]:
    """Read and check everything at a path: a file, a snapshot, a recorded step, or all of these in a folder or run.

    Raises:
        UserError: there is no file of specbatch.
    """
    if path.is_file():
        return [inspect_file(path)]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or directory")
    if (path / MANIFEST).exists():
        return [inspect_snapshot(path)]
    found = [inspect_file(file) for file in sorted(path.glob("rank-*.h5"))]
    if not found:
        run = RunDir(path)
        folders = [run.snapshots, run.recordings] if run.config.exists() else [path]
        steps = sorted((step for folder in folders for step in folder.glob("step-*")), key=_order)
        found = [one for step in steps for one in inspect(step)]
    if not found:
        raise UserError(f"{path}: there is no snapshot and no recording in it")
    return found


def inspect_snapshot(path: Path) -> Inspected:
    """Inspect the whole folder of a snapshot."""
    size = sum(file.stat().st_size for file in path.iterdir())
    found = Inspected(str(path), "snapshot", size, damage=list(damage(path)))
    try:
        manifest = read_manifest(path)
    except DamagedSnapshot:
        return found
    found.about = {
        "step": manifest.step,
        "ranks": manifest.ranks,
        "specbatch": manifest.specbatch,
        "facts": manifest.facts,
        "files": manifest.files,
        "values": manifest.values,
    }
    for name, stored in manifest.tensors.items():
        size = dtype_of(stored.dtype).itemsize * math.prod(stored.size)
        found.tensors.append(Tensor(name, stored.dtype, list(stored.size), size))
    return found


def inspect_file(path: Path) -> Inspected:
    """Inspect one file by the checksums that it contains."""
    found = Inspected(str(path), "snapshot file", path.stat().st_size)
    try:
        with h5py.File(path, "r", locking=False) as file:
            if ABOUT in file.attrs:
                found.about = json.loads(file.attrs[ABOUT])
                found.kind = found.about["kind"]
            for name, dataset in _datasets(file):
                found.tensors.append(
                    Tensor(
                        name, str(dataset.attrs.get("dtype", dataset.dtype)), list(dataset.shape), int(dataset.nbytes)
                    )
                )
                found.damage += _problem(name, dataset)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        found.damage.append(f"{path} can't be read: {error}")
        if not found.tensors:
            found.kind = "unreadable"
    return found


def _datasets(group: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    for name in group:
        entry = group[name]
        if isinstance(entry, h5py.Dataset):
            yield entry.name.removeprefix("/"), entry
        else:
            yield from _datasets(entry)


def _problem(name: str, dataset: h5py.Dataset) -> list[str]:
    try:
        stored = str(dataset.attrs["xxh3_128"])
        values = np.ascontiguousarray(dataset[()])
    except (OSError, RuntimeError, KeyError) as error:
        return [f"{name} can't be read: {error}"]
    summed = xxhash.xxh3_128_hexdigest(values.data)
    return [] if summed == stored else [f"{name} is not what was written: its checksum differs"]


def _order(step: Path) -> tuple[str, int]:
    number = step.name.removeprefix("step-")
    return step.parent.name, int(number) if number.isdigit() else -1

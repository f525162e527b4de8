"""The folder of a snapshot, ``step-<s>/``: one ``rank-<r>.h5`` for each rank that had something to write, and last of
all ``manifest.json``. A folder without a manifest is not a snapshot.

Only JSON and file sizes are read here, so that commands on a login node need neither torch nor HDF5.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from specbatch.errors import RunError
from specbatch.rundir import write_whole
from specbatch.snapshot.durable_file import sync_folder

FORMAT = 1
MANIFEST = "manifest.json"

Best = Callable[[Collection[int]], int | None]
"""Returns which of the given steps has the best draft; None if unknown."""


class DamagedSnapshot(RunError):
    """A snapshot or a part of it differs from what was written; the message names file and tensor."""


class StoredChunk(msgspec.Struct, frozen=True):
    """A contiguous part of a tensor: one dataset of one file."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    dataset: str
    checksum: str
    """XXH3-128 of the values' bytes, row by row, in hexadecimal."""


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor, in as many chunks as it had shards."""

    dtype: str
    """Name of the dtype in torch, without ``torch.``."""
    size: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


class SnapshotManifest(msgspec.Struct, frozen=True):
    """Contents of a snapshot, and the training that it belongs to."""

    format: int
    specbatch: str
    """Version that wrote it."""
    step: int
    ranks: int
    facts: dict[str, Any]
    """Facts that must be the same when training continues: plan, model, optimizer."""
    files: dict[str, int]
    """Names and lengths in bytes."""
    tensors: dict[str, StoredTensor]
    values: dict[str, Any]
    """All values that are not tensors (`specbatch.snapshot.json_state`)."""
    paths: dict[str, tuple[str | int, ...]]
    """Path of each tensor and value in the nested state."""
    checksum: str = ""
    """XXH3-128 of this document as compact JSON, with this field empty."""


def snapshot_path(folder: Path, step: int) -> Path:
    """The snapshot of a step among the snapshots of a run."""
    return folder / f"step-{step}"


def write_manifest(snapshot: Path, manifest: SnapshotManifest) -> None:
    """Make a snapshot of a folder whose files are on disk already."""
    manifest = msgspec.structs.replace(manifest, checksum=_checksum(manifest))
    write_whole(snapshot / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    sync_folder(snapshot)
    sync_folder(snapshot.parent)


def read_manifest(snapshot: Path) -> SnapshotManifest:
    """The manifest of a whole snapshot: undamaged itself, all files there and as long as they were.

    Raises:
        DamagedSnapshot: naming the file.
    """
    path = snapshot / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=SnapshotManifest)
    except FileNotFoundError:
        raise DamagedSnapshot(f"{path} is missing: the snapshot was never finished") from None
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise DamagedSnapshot(f"{path} can't be read: {error}") from None
    if manifest.format != FORMAT:
        raise DamagedSnapshot(f"{path} has format {manifest.format}; this specbatch reads format {FORMAT}")
    if manifest.checksum != _checksum(manifest):
        raise DamagedSnapshot(f"{path} is not what was written: its checksum differs")
    for name, size in manifest.files.items():
        if not re.fullmatch(r"rank-\d+\.h5", name):
            raise DamagedSnapshot(f"{path} names a file {name!r}, which is none of a snapshot's")
        try:
            found = (snapshot / name).stat().st_size
        except OSError as error:
            raise DamagedSnapshot(f"{snapshot / name} can't be read: {error.strerror}") from None
        if found != size:
            raise DamagedSnapshot(f"{snapshot / name} has {found} bytes of {size}")
    return manifest


def snapshots(folder: Path) -> list[int]:
    """Steps, ascending, of all snapshots that were finished, damaged since or not."""
    return [step for step, path in _folders(folder) if (path / MANIFEST).exists()]


def whole_snapshots(folder: Path) -> list[int]:
    """Steps, ascending, of the snapshots whose manifest and file lengths are right.

    What the files hold is checked when it is read; `specbatch.snapshot.reading.verify` does only that.
    """
    whole = []
    for step, path in _folders(folder):
        with contextlib.suppress(DamagedSnapshot):
            read_manifest(path)
            whole.append(step)
    return whole


def half_written(folder: Path) -> list[Path]:
    """Folders of steps that have no manifest: a save that is under way, or was cut off."""
    return [path for _, path in _folders(folder) if not (path / MANIFEST).exists()]


def superfluous(folder: Path, keep: int, best: Best | None = None) -> list[Path]:
    """Snapshots older than the newest ``keep`` complete ones, except the best, and those that were set aside."""
    whole = whole_snapshots(folder)
    kept = whole[-keep:]
    spared = best(whole) if best else None
    old = [path for step, path in _folders(folder) if kept and step < kept[0] and step != spared]
    return old + sorted(folder.glob("refused-step-*"))


def set_aside(snapshot: Path) -> None:
    """Rename a snapshot that can't be read, so that it is not taken for the newest."""
    aside = snapshot.with_name(f"refused-{snapshot.name}")
    remove(aside)
    snapshot.rename(aside)


def remove(snapshot: Path) -> None:
    """Delete a snapshot; a part of it is never taken for a whole one, whenever this is cut off."""
    with contextlib.suppress(FileNotFoundError):
        (snapshot / MANIFEST).unlink(missing_ok=True)
        sync_folder(snapshot)
        shutil.rmtree(snapshot)


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Sentences that name each fact that is not the same, as ``plan.seed was 0 and is 1``."""
    before, now = _leaves("", saved), _leaves("", msgspec.json.decode(msgspec.json.encode(current)))
    return [
        f"{name} was {before.get(name, 'not there')} and is {now.get(name, 'not there')}"
        for name in dict.fromkeys([*before, *now])
        if name not in before or name not in now or before[name] != now[name]
    ]


def _leaves(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= _leaves(f"{name}.{key}" if name else key, inner)
    return leaves


def _folders(folder: Path) -> list[tuple[int, Path]]:
    named = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def _checksum(manifest: SnapshotManifest) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(manifest, checksum="")))

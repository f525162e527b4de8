"""Recordings: packs as they were trained, and the losses that they gave, so that steps can be trained again.

``recordings/step-<s>/rank-<r>.h5`` holds the packs of one rank in one step. A file has its name once it is whole; a
step is whole with the files of all its ranks. Every dataset carries its checksum (`specbatch.snapshot.chunks`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import msgspec
import torch

from specbatch.pack_manifest import PackId
from specbatch.snapshot.chunks import read_checked, write_tensor
from specbatch.snapshot.durable_file import DurableFile
from specbatch.snapshot.manifest import DamagedSnapshot

ABOUT = "about"
"""Attribute of a file's root: JSON that describes the file."""
RESULT = "result"


@dataclass
class RecordedPack:
    """A pack of one rank, in host memory."""

    id: PackId
    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of each sample; none in a pack that trained as zero."""
    void: str
    """Why it trained as zero; empty if it did not."""
    tensors: dict[str, torch.Tensor]
    """``input_ids``, ``loss_mask`` and the captured tensors by name, as the draft read them."""
    result: torch.Tensor
    """Float ``[2, T]``: weighted losses of the terms, and right proposals."""


class AboutPack(msgspec.Struct, frozen=True):
    """Description of a pack in a file."""

    id: PackId
    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    void: str


class About(msgspec.Struct, frozen=True):
    """Description of a file."""

    kind: str
    format: int
    step: int
    rank: int
    ranks: int
    together: int
    """Ranks that train a pack together; each has only its share of the rows."""
    packs: tuple[AboutPack, ...]
    line: dict[str, Any]
    """The line of the step in ``metrics.jsonl``, with exact floats."""


def step_folder(recordings: Path, step: int) -> Path:
    return recordings / f"step-{step}"


def write_rank(
    recordings: Path,
    step: int,
    packs: Sequence[RecordedPack],
    line: dict[str, Any],
    *,
    rank: int,
    ranks: int,
    together: int,
) -> int:
    """Write the packs of a rank and wait for the disk.

    Args:
        line: what the step gave.
        together: ranks that train a pack together.

    Returns:
        bytes of the file.

    Raises:
        OSError: nothing of it is left then.
    """
    folder = step_folder(recordings, step)
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"rank-{rank}.h5", folder / f".rank-{rank}.part"
    told = tuple(AboutPack(pack.id, pack.samples, pack.lengths, pack.void) for pack in packs)
    about = About("recording", 1, step, rank, ranks, together, told, line)
    try:
        with DurableFile(part) as disk:
            with h5py.File(disk, "w", libver="latest") as file, ThreadPoolExecutor(1, "checksums") as aside:
                file.attrs[ABOUT] = msgspec.json.encode(about).decode()
                for pack in packs:
                    for name, tensor in {**pack.tensors, RESULT: pack.result}.items():
                        write_tensor(file, f"{_name(pack.id)}/{name}", tensor, aside)
                        if disk.error is not None:
                            break
            size = disk.bytes
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others' files are in it
            folder.rmdir()
        raise
    return size


class RecordedStep:
    """All files of a recorded step, open for reading.

    Raises:
        DamagedSnapshot: a file can't be read, naming it.
    """

    def __init__(self, recordings: Path, step: int) -> None:
        self.step = step
        self.path = step_folder(recordings, step)
        self.about: dict[int, About] = {}
        self._files: dict[int, h5py.File] = {}
        for rank, path in _rank_files(self.path).items():
            try:
                self._files[rank] = h5py.File(path, "r", locking=False)
                self.about[rank] = msgspec.json.decode(self._files[rank].attrs[ABOUT], type=About)
            except (OSError, RuntimeError, KeyError, msgspec.DecodeError) as error:
                self.close()
                raise DamagedSnapshot(f"{path} can't be read: {error}") from error

    @property
    def whole(self) -> bool:
        """Whether all ranks' files are there."""
        sizes = {about.ranks for about in self.about.values()}
        return len(sizes) == 1 and set(self.about) == set(range(sizes.pop()))

    @property
    def together(self) -> int:
        """Ranks that trained each pack together."""
        return self.about[0].together

    @property
    def line(self) -> dict[str, Any]:
        """The step's metrics."""
        return self.about[0].line

    def read(self, pack: PackId, share: int = 0) -> RecordedPack | None:
        """A pack, checked; None if it was not recorded.

        Args:
            share: whose part of it, of the ranks that trained it together.

        Raises:
            DamagedSnapshot: naming file and dataset.
        """
        for owner, about in self.about.items():
            told = next((told for told in about.packs if told.id == pack), None)
            if told is None or owner % about.together != share:
                continue
            group = self._files[owner][_name(pack)]
            where = str(self.path / f"rank-{owner}.h5")
            tensors = {name: read_checked(group, name, where) for name in group}
            result = tensors.pop(RESULT, None)
            if result is None or not {"input_ids", "loss_mask"} <= tensors.keys():
                raise DamagedSnapshot(
                    f"{where}: pack {_name(pack)} lacks datasets; it has {', '.join(group) or 'none'}"
                )
            return RecordedPack(told.id, told.samples, told.lengths, told.void, tensors, result)
        return None

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def recorded_steps(recordings: Path) -> list[int]:
    """Steps, ascending, of which the files of all ranks are there."""
    found = []
    for step in _steps(recordings):
        try:
            recorded = RecordedStep(recordings, step)
        except DamagedSnapshot:
            continue
        if recorded.whole:
            found.append(step)
        recorded.close()
    return found


def consecutive(steps: Sequence[int], first: int) -> int:
    """How many of the steps follow each other without a gap, from the first one on."""
    count = 0
    while first + count in steps:
        count += 1
    return count


def forget(recordings: Path, rank: int, ranks: int, *, before: int = 0, after: int | None = None) -> None:
    """Delete a rank's files of old steps or of steps that will be trained again, and the remains of interrupted writes.
    Files of ranks that no longer exist are divided among the present ranks.

    Args:
        ranks: that record now.
        before: steps below this one.
        after: steps above this one.

    Raises:
        OSError: a file can't be deleted.
    """
    for step in _steps(recordings):
        if step < before or (after is not None and step > after):
            folder = step_folder(recordings, step)
            with contextlib.suppress(FileNotFoundError):  # another rank was quicker
                for path in folder.iterdir():
                    named = re.fullmatch(r"rank-(\d+)\.h5|\.rank-(\d+)\.part", path.name)
                    if named and int(named[1] or named[2]) % ranks == rank:
                        path.unlink()
            with contextlib.suppress(OSError):  # other ranks' files are in it, or it is gone already
                folder.rmdir()


def _rank_files(folder: Path) -> dict[int, Path]:
    named = ((re.fullmatch(r"rank-(\d+)\.h5", path.name), path) for path in folder.glob("rank-*.h5"))
    return {int(match[1]): path for match, path in sorted(named, key=lambda one: one[1].name) if match}


def _steps(recordings: Path) -> list[int]:
    named = (re.fullmatch(r"step-(\d+)", path.name) for path in recordings.glob("step-*"))
    return sorted(int(match[1]) for match in named if match)


def _name(pack: PackId) -> str:
    return f"{pack[0]}.{pack[1]}"

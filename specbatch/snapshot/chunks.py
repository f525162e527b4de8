"""Stores tensors as HDF5 datasets: written with a checksum, and refused if it differs on reading.

A dataset is contiguous and has no filter, so that writing runs at the speed of the disk. Its XXH3-128 is in the
manifest and also next to the dataset, for readers that have only the file. HDF5's own structures have checksums of
HDF5. Types that numpy lacks (bfloat16, float8) are stored as unsigned integers of their bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
import xxhash

from specbatch.snapshot.manifest import DamagedSnapshot, StoredChunk

_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype with this name.

    Raises:
        ValueError: torch has no such type.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no type {name!r}")
    return dtype


def _stored_as(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype of the same width that numpy has."""
    try:
        torch.empty(0, dtype=dtype).numpy()
    except TypeError:
        return _BITS[dtype.itemsize]
    return dtype


def part(offset: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """Return the index of a part of a tensor."""
    return tuple(slice(first, first + count) for first, count in zip(offset, size, strict=True))


def write_tensor(file: h5py.File, dataset: str, tensor: torch.Tensor, aside: Executor) -> str:
    """Store a tensor of any shape, also without dimensions or without values.

    Args:
        aside: computes the checksum while this thread writes.

    Returns:
        the checksum of its bytes.
    """
    tensor = tensor.detach().cpu().contiguous()
    array = tensor.view(_stored_as(tensor.dtype)).numpy()
    summing = aside.submit(xxhash.xxh3_128_hexdigest, array.data)
    stored = file.create_dataset(dataset, data=array, track_times=False)
    checksum = summing.result()
    stored.attrs.update({"dtype": dtype_name(tensor.dtype), "xxh3_128": checksum})
    return checksum


def read_checked(group: h5py.Group, name: str, where: str) -> torch.Tensor:
    """Read a tensor that `write_tensor` stored, and verify it against the checksum next to it.

    Args:
        where: the file, for the error.

    Raises:
        DamagedSnapshot: naming file and dataset.
    """
    named = f"{where}: {group.name}/{name}"
    try:
        dataset = group[name]
        array, dtype = np.ascontiguousarray(dataset[()]), dtype_of(str(dataset.attrs["dtype"]))
        checksum = str(dataset.attrs["xxh3_128"])
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise DamagedSnapshot(f"{named} can't be read: {error}") from error
    if xxhash.xxh3_128_hexdigest(array.data) != checksum:
        raise DamagedSnapshot(f"{named} is not what was written: its checksum differs")
    return torch.from_numpy(array).view(dtype).reshape(dataset.shape)


class ChunkFiles:
    """The files of a snapshot, opened as they are needed.

    They are read without locks, which some network file systems refuse: a snapshot never changes.
    """

    def __init__(self, snapshot: Path, opened: ExitStack) -> None:
        self.snapshot = snapshot
        self._opened = opened
        self._files: dict[str, h5py.File] = {}

    def read(self, name: str, dtype: torch.dtype, chunk: StoredChunk) -> torch.Tensor:
        """Read a chunk of a tensor, and verify it.

        Args:
            name: name of the tensor, for the error.

        Returns:
            ``dtype``, of the chunk's size, in host memory.

        Raises:
            DamagedSnapshot: naming file and tensor.
        """
        where = f"{self.snapshot / chunk.file}: tensor {name}"
        array = np.empty(chunk.size, torch.empty(0, dtype=_stored_as(dtype)).numpy().dtype)
        try:
            if chunk.file not in self._files:
                opened = h5py.File(self.snapshot / chunk.file, "r", locking=False)
                self._files[chunk.file] = self._opened.enter_context(opened)
            dataset = self._files[chunk.file][chunk.dataset]
            if dataset.shape != array.shape or dataset.dtype != array.dtype:
                raise DamagedSnapshot(f"{where} is {dataset.dtype} {dataset.shape}, not {array.dtype} {array.shape}")
            if array.size:
                dataset.read_direct(array)
        except (OSError, RuntimeError, KeyError, ValueError, AttributeError) as error:
            raise DamagedSnapshot(f"{where} can't be read: {error}") from error
        if xxhash.xxh3_128_hexdigest(array.data) != chunk.checksum:
            raise DamagedSnapshot(f"{where} is not what was written: its checksum differs")
        return torch.from_numpy(array).view(dtype)


@contextmanager
def chunk_files(snapshot: Path) -> Iterator[ChunkFiles]:
    """Open the files of a snapshot; they are closed at the end."""
    with ExitStack() as opened:
        yield ChunkFiles(snapshot, opened)

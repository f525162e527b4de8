"""The tensors of a Hugging Face directory, located by the headers of its safetensors files.

Headers are read according to the format, so that shapes, names and bytes are known without torch.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from specbatch.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BLOCK = 1 << 20
_LONGEST_HEADER = 100 << 20
"""Limit of the safetensors format."""


class TensorLocation(msgspec.Struct, frozen=True, gc=False):
    """Place of one tensor."""

    file: Path
    dtype: str
    """Dtype in safetensors' notation: ``BF16``, ``F32``, ..."""
    shape: tuple[int, ...]
    begin: int
    end: int
    """Range of bytes in the file, half open."""


class _Entry(msgspec.Struct, frozen=True, gc=False):
    """A tensor's entry in a header; the entry without these fields is ``__metadata__``."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (0, 0)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class Weights:
    """The tensors of a model directory, in one file or in shards with an index."""

    path: Path

    @cached_property
    def files(self) -> dict[str, list[str] | None]:
        """Names of the files, and the tensors that the index expects in each (None without index).

        Raises:
            UserError: there are no safetensors, or the index can't be read or names a missing file.
        """
        index = self.path / INDEX
        if not index.is_file():
            if (self.path / SINGLE).is_file():
                return {SINGLE: None}
            raise UserError(
                f"{self.path}: has neither {SINGLE} nor {INDEX}; specbatch reads the target's embedding and head "
                "from safetensors: convert the checkpoint with `save_pretrained` of transformers"
            )
        try:
            where = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except ValueError as error:
            raise UserError(f"{index}: not an index of safetensors ({error}); download it again") from error
        files: dict[str, list[str]] = {}
        for tensor, name in where.items():
            files.setdefault(name, []).append(tensor)
        for name, tensors in files.items():
            # Once per file: on a parallel file system each check takes up to a millisecond.
            if not (self.path / name).is_file():
                raise UserError(f"{index}: {tensors[0]} should be in {name}, which is missing; download it again")
        return {**files}

    @cached_property
    def tensors(self) -> dict[str, TensorLocation]:
        """Every tensor by its name.

        Raises:
            UserError: a file is cut off, or lacks a tensor that the index expects there.
        """
        found: dict[str, TensorLocation] = {}
        for name, expected in self.files.items():
            file = self.path / name
            header, data = _header(file)
            size = file.stat().st_size
            for tensor, entry in header.items():
                begin, end = entry.data_offsets
                if data + end > size:
                    raise UserError(f"{file}: {tensor} reaches beyond the end of the file; download it again")
                found[tensor] = TensorLocation(file, entry.dtype, entry.shape, data + begin, data + end)
            for tensor in expected or []:
                if tensor not in header:
                    raise UserError(f"{file}: has no tensor {tensor}, though {INDEX} says so; download it again")
        return found

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.end - stored.begin for stored in self.tensors.values())

    def load(self, name: str) -> torch.Tensor:
        """Load a tensor to the CPU, in its stored shape and dtype."""
        from safetensors import safe_open

        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def load_numpy(self, name: str) -> np.ndarray:
        """Load a tensor with a dtype that numpy has, without torch."""
        from safetensors import safe_open

        with safe_open(self.tensors[name].file, framework="np") as file:
            return file.get_tensor(name)

    def same(self, first: str, second: str) -> bool:
        """Return whether two tensors are equal to the last bit; reads both, a block at a time."""
        a, b = self.tensors[first], self.tensors[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with a.file.open("rb") as left, b.file.open("rb") as right:
            left.seek(a.begin)
            right.seek(b.begin)
            for at in range(0, a.end - a.begin, _BLOCK):
                size = min(_BLOCK, a.end - a.begin - at)
                if left.read(size) != right.read(size):
                    return False
        return True

    def fingerprint(self) -> str:
        """Return a hash of names, shapes, sizes and the first and last bytes of each file: 16 hexadecimal digits.

        It does not cover all bytes, since reading the files of a large target takes minutes.
        """
        digest = hashlib.sha256()
        for name in sorted(self.files):
            size = (self.path / name).stat().st_size
            digest.update(f"{name} {size}\n".encode())
            with (self.path / name).open("rb") as file:
                digest.update(file.read(_BLOCK))
                file.seek(max(size - _BLOCK, 0))
                digest.update(file.read(_BLOCK))
        return digest.hexdigest()[:16]


def _header(file: Path) -> tuple[dict[str, _Entry], int]:
    """Return the header of a safetensors file, and the offset of its data."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _LONGEST_HEADER + 1
        try:
            if length > _LONGEST_HEADER:
                raise ValueError("no header")
            header = msgspec.json.decode(stream.read(length), type=dict[str, _Entry])
        except ValueError as error:
            raise UserError(
                f"{file}: not a safetensors file ({error}); download it again, with git-lfs if it was cloned"
            ) from error
    header.pop("__metadata__", None)
    return header, 8 + length

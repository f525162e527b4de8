"""The tensors of a Hugging Face directory, found by the headers of its safetensors files.

Headers are read as the format says, so that shapes, names and bytes can be looked at without torch.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BLOCK = 1 << 20
_LONGEST_HEADER = 100 << 20
"""Limit of the safetensors format."""


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    file: Path
    dtype: str
    """As safetensors writes it: ``BF16``, ``F32``, ..."""
    shape: tuple[int, ...]
    begin: int
    end: int
    """Bytes of the file, half open."""


@dataclass(frozen=True)
class Weights:
    """All tensors of a model directory, in one file or in shards with an index."""

    path: Path

    @cached_property
    def files(self) -> dict[str, list[str] | None]:
        """Names of the files, and which tensors the index expects there (None: no index).

        Raises:
            UserError: if there are no safetensors, or the index can't be read or names a file that is missing.
        """
        index = self.path / INDEX
        if not index.is_file():
            if (self.path / SINGLE).is_file():
                return {SINGLE: None}
            raise UserError(
                f"{self.path}: neither {SINGLE} nor {INDEX} is there; specbatch reads the target's embedding and head "
                "from safetensors: convert the checkpoint with `save_pretrained` of transformers"
            )
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{index}: not an index of safetensors ({error}); download it again") from error
        files: dict[str, list[str] | None] = {}
        for tensor, name in where.items():
            if not (self.path / name).is_file():
                raise UserError(f"{index}: {tensor} is said to be in {name}, which is missing; download it again")
            files[name] = [*(files.get(name) or []), tensor]
        return files

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its name.

        Raises:
            UserError: if a file is cut off or lacks a tensor that the index says is there.
        """
        found: dict[str, Stored] = {}
        for name, expected in self.files.items():
            file = self.path / name
            header, data = _header(file)
            size = file.stat().st_size
            for tensor, entry in header.items():
                begin, end = entry["data_offsets"]
                if data + end > size:
                    raise UserError(f"{file}: {tensor} reaches beyond the end of the file; download it again")
                found[tensor] = Stored(file, entry["dtype"], tuple(entry["shape"]), data + begin, data + end)
            for tensor in expected or []:
                if tensor not in header:
                    raise UserError(f"{file}: has no tensor {tensor}, though {INDEX} says so; download it again")
        return found

    def load(self, name: str) -> torch.Tensor:
        """One tensor, in the shape and dtype in which it is stored, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def load_numpy(self, name: str) -> np.ndarray:
        """One tensor of a type that numpy has, without torch."""
        from safetensors import safe_open

        with safe_open(self.tensors[name].file, framework="np") as file:
            return file.get_tensor(name)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal to the last bit; reads both, a block at a time."""
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
        """16 hexadecimal digits over names, shapes, sizes and the first and last bytes of each file.

        Not over all bytes: the files of a large target take minutes to read.
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


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _LONGEST_HEADER + 1
        try:
            if length > _LONGEST_HEADER:
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(
                f"{file}: not a safetensors file ({error}); download it again, with git-lfs if it was cloned"
            ) from error
    header.pop("__metadata__", None)
    return header, 8 + length

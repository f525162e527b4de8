"""The samples of one source on disk: plain arrays that are appended to and read by memory map.

======================  ======================================================================
``ids.bin``             int32, the tokens of all samples, concatenated
``ends.bin``            int64 ``[S]``, where each sample ends in it
``spans.bin``           int32 ``[spans, 2]``, runs of loss tokens: first and one past the last, within the sample
``span_ends.bin``       int64 ``[S]``, where the spans of each sample end
``rows.bin``            int64 ``[S]``, the row of the source that each sample comes from
``hashes.bin``          uint64 ``[S]``, of each sample's tokens and images: equal samples have equal ones
``images.bin``          JSON, the images of all samples that have any, ``image_ends.bin`` int64 ``[S]``, where each ends
``prompts.bin``         int32, the prompts of all conversations, ``prompt_ends.bin`` int64, where each ends
``loss_token_counts.npy``  int64 ``[tokenizer's ids]``, how often each id is a loss token
======================  ======================================================================
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import xxhash

from specbatch.corpus.images import Image

KINDS: dict[str, np.dtype] = {
    "ids": np.dtype("<i4"),
    "ends": np.dtype("<i8"),
    "spans": np.dtype("<i4"),
    "span_ends": np.dtype("<i8"),
    "rows": np.dtype("<i8"),
    "hashes": np.dtype("<u8"),
    "images": np.dtype("u1"),
    "image_ends": np.dtype("<i8"),
    "prompts": np.dtype("<i4"),
    "prompt_ends": np.dtype("<i8"),
}
SMALL_BYTES = 1 << 22
"""Smaller arrays are read, not mapped, since a corpus of thousands of files would keep all of them open."""
COUNTS = "loss_token_counts.npy"


def spans_of(mask: np.ndarray) -> np.ndarray:
    """Convert a bool mask ``[tokens]`` to its runs, int32 ``[spans, 2]``."""
    # np.diff with the ends given takes four times as long, and this is done for each sample.
    around = np.zeros(len(mask) + 2, dtype=bool)
    around[1:-1] = mask
    return np.flatnonzero(around[1:] != around[:-1]).astype(np.int32).reshape(-1, 2)


def mask_of(spans: np.ndarray, tokens: int) -> np.ndarray:
    """Convert runs, int ``[spans, 2]``, to a bool mask ``[tokens]``."""
    mask = np.zeros(tokens, dtype=bool)
    for first, end in spans.tolist():
        mask[first:end] = True
    return mask


class StoredSamples:
    """Reads what `SampleAppender` wrote; data is loaded only when accessed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def ids(self) -> np.ndarray:
        return _mapped_ids(self.folder / "ids.bin", self._ids_bytes)

    @cached_property
    def _ids_bytes(self) -> int:
        return (self.folder / "ids.bin").stat().st_size

    @cached_property
    def ends(self) -> np.ndarray:
        return self._map("ends")

    @cached_property
    def spans(self) -> np.ndarray:
        return self._map("spans").reshape(-1, 2)

    @cached_property
    def span_ends(self) -> np.ndarray:
        return self._map("span_ends")

    @cached_property
    def rows(self) -> np.ndarray:
        return self._map("rows")

    @cached_property
    def hashes(self) -> np.ndarray:
        return self._map("hashes")

    @property
    def counts(self) -> np.ndarray:
        return np.load(self.folder / COUNTS)

    def tokens(self, i: int) -> np.ndarray:
        """Return a copy of a sample's tokens, int32 ``[tokens]``."""
        return np.array(self.ids[self._start(self.ends, i) : self.ends[i]])

    def mask(self, i: int) -> np.ndarray:
        """Return the loss mask of a sample, bool ``[tokens]``."""
        spans = self.spans[self._start(self.span_ends, i) : self.span_ends[i]]
        return mask_of(spans, int(self.ends[i]) - self._start(self.ends, i))

    def images(self, i: int) -> tuple[Image, ...]:
        """Return the images of a sample."""
        if not self._has_images:
            return ()
        found = self._images[self._start(self._image_ends, i) : self._image_ends[i]].tobytes()
        return msgspec.json.decode(found, type=tuple[Image, ...]) if found else ()

    def image_folders(self) -> set[Path]:
        """Return the directories of all images that are files."""
        images = (image for i in range(len(self)) for image in self.images(i)) if self._has_images else ()
        return {Path(image.source).parent for image in images if not image.source.startswith("data:")}

    @cached_property
    def _has_images(self) -> bool:
        path = self.folder / "images.bin"
        # An older specbatch did not write it.
        return path.is_file() and path.stat().st_size > 0

    @cached_property
    def _images(self) -> np.ndarray:
        return self._map("images")

    @cached_property
    def _image_ends(self) -> np.ndarray:
        return self._map("image_ends")

    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt."""
        ids, ends = self._map("prompts"), self._map("prompt_ends")
        return [piece.tolist() for piece in np.split(ids, ends[:-1])] if ends.size else []

    @staticmethod
    def _start(ends: np.ndarray, i: int) -> int:
        return int(ends[i - 1]) if i else 0

    def _map(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        if path.stat().st_size < SMALL_BYTES:
            return np.fromfile(path, dtype=KINDS[name])
        return np.memmap(path, dtype=KINDS[name], mode="r")


@lru_cache(maxsize=64)
def _mapped_ids(path: Path, size: int) -> np.ndarray:
    """Map the tokens of a source, ``size`` bytes. Only recent maps are kept, since each keeps a file open."""
    return np.memmap(path, dtype=KINDS["ids"], mode="r") if size else np.zeros(0, dtype=KINDS["ids"])


class SampleAppender:
    """Appends samples. After a crash, writing can continue from the last `flush`.

    Args:
        folder: an existing directory; the files of an earlier appender in it are continued.
        tokenizer_size: ids that the tokenizer can produce, from 0.
        sizes: bytes of each file at the flush to continue from; if not given, the files are started again.
    """

    def __init__(self, folder: Path, tokenizer_size: int, sizes: dict[str, int] | None = None) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        for name in KINDS:
            file = (folder / f"{name}.bin").open("r+b" if sizes else "w+b", buffering=1 << 20)
            file.truncate(sizes[name] if sizes else 0)
            file.seek(0, os.SEEK_END)
            self._files[name] = file
        self._counts = np.zeros(tokenizer_size, dtype=np.int64)
        self._uncounted: list[np.ndarray] = []
        self._uncounted_tokens = 0
        if sizes:
            found = StoredSamples(folder)
            for i in range(len(found)):
                self._count(found.ids[found._start(found.ends, i) : found.ends[i]][found.mask(i)])
        tokens, spans, prompts = (self._files[name].tell() for name in ("ids", "spans", "prompts"))
        self._tokens, self._spans, self._prompts = tokens // 4, spans // 8, prompts // 4
        self._image_bytes = self._files["images"].tell()

    def add(self, ids: np.ndarray, mask: np.ndarray, row: int, images: Sequence[Image] = ()) -> tuple[int, np.ndarray]:
        """Append a sample.

        Args:
            ids: int32 ``[tokens]``.
            mask: bool ``[tokens]``.
            row: row of the source, from 1.

        Returns:
            the hash of its tokens and images, and the spans of its loss tokens.
        """
        spans = spans_of(mask)
        shown = "".join(image.digest for image in images).encode()
        digest = xxhash.xxh3_64_intdigest(ids.tobytes() + shown)
        stored = msgspec.json.encode(images) if images else b""
        self._image_bytes += len(stored)
        self._files["images"].write(stored)
        self._files["image_ends"].write(self._image_bytes.to_bytes(8, "little"))
        self._tokens += len(ids)
        self._spans += len(spans)
        self._write("ids", ids)
        self._write("spans", spans)
        for name, value in (("ends", self._tokens), ("span_ends", self._spans), ("rows", row), ("hashes", digest)):
            self._files[name].write(value.to_bytes(8, "little"))
        self._count(ids[mask])
        return digest, spans

    def add_prompt(self, ids: np.ndarray) -> None:
        """Append a prompt, int32 ``[tokens]``."""
        self._prompts += len(ids)
        self._write("prompts", ids)
        self._files["prompt_ends"].write(self._prompts.to_bytes(8, "little"))

    def flush(self) -> dict[str, int]:
        """Write everything to disk; return the bytes of each file."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def finish(self) -> None:
        """Write everything to disk, including the counts."""
        self._count(np.zeros(0, dtype=np.int32), now=True)
        np.save(self.folder / COUNTS, self._counts)
        self.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _count(self, loss_tokens: np.ndarray, now: bool = False) -> None:
        """Count loss tokens, many at a time."""
        self._uncounted.append(loss_tokens)
        self._uncounted_tokens += len(loss_tokens)
        if now or self._uncounted_tokens > 1 << 20:
            self._counts += np.bincount(np.concatenate(self._uncounted), minlength=self._counts.size)
            self._uncounted, self._uncounted_tokens = [], 0

    def _write(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values, dtype=KINDS[name]).tobytes())

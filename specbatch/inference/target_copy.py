"""A copy of a target: which files it has, how it is made, and whether it is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from specbatch.weights import Weights

MANIFEST = "manifest.json"
SMALL_BYTES = 64 << 20
"""Files besides the weights up to this size are copied; larger ones, and directories, are links to the target's."""
AT_ONCE = 8
"""Files that are copied at the same time: a parallel file system gives one reader a part of what it has."""
BLOCK_BYTES = 8 << 20


class _File(msgspec.Struct, frozen=True):
    name: str
    size: int
    changed_ns: int


class Ended(Exception):
    """The copying was asked to end."""


@dataclass(frozen=True)
class CopiedTarget:
    """A target that is copied."""

    folder: Path

    @cached_property
    def files(self) -> list[_File]:
        """Return the files that are copied."""
        names = set(self.weights.files)
        names |= {entry.name for entry in os.scandir(self.folder) if entry.is_file() and self._is_small(entry)}
        found = []
        for name in sorted(names):
            there = (self.folder / name).stat()
            found.append(_File(name, there.st_size, there.st_mtime_ns))
        return found

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.folder)

    @cached_property
    def manifest(self) -> bytes:
        return msgspec.json.encode(self.files)

    @cached_property
    def digest(self) -> str:
        """Name of its copies: another state of the target has another one."""
        return hashlib.sha256(self.weights.fingerprint().encode() + self.manifest).hexdigest()[:16]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def name(self) -> str:
        """Name of the copied directory, from which SGLang and transformers may guess what the model is."""
        of_hub = self.folder.parent.name == "snapshots"
        return self.folder.parent.parent.name if of_hub else self.folder.name

    def is_whole(self, copy: Path) -> bool:
        """Return whether a directory holds a complete copy."""
        try:
            if (copy / MANIFEST).read_bytes() != self.manifest:
                return False
            return all((copy / self.name / file.name).stat().st_size == file.size for file in self.files)
        except OSError:
            return False

    def copy_to(self, copy: Path, ended: threading.Event) -> None:
        """Copy the target; an interrupted copy never counts as complete.

        Raises:
            OSError: a file can't be read, or written.
            Ended: ``ended`` was set.
        """
        part = copy.with_suffix(".part")
        for left in (part, copy):
            shutil.rmtree(left, ignore_errors=True)
        to, broken = part / self.name, threading.Event()
        to.mkdir(parents=True)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            copies = [
                pool.submit(_copy, self.folder / file.name, to / file.name, file.size, ended, broken)
                for file in self.files
            ]
        for each in copies:
            each.result()
        for entry in os.scandir(self.folder):
            if not (to / entry.name).exists():
                (to / entry.name).symlink_to(self.folder / entry.name)
        (part / MANIFEST).write_bytes(self.manifest)
        part.rename(copy)

    def _is_small(self, entry: os.DirEntry[str]) -> bool:
        return entry.stat().st_size <= SMALL_BYTES


def _copy(source: Path, to: Path, size: int, ended: threading.Event, broken: threading.Event) -> None:
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        buffer, copied = memoryview(bytearray(BLOCK_BYTES)), 0
        with source.open("rb", buffering=0) as reads, to.open("xb", buffering=0) as writes:
            while (read := reads.readinto(buffer)) and not broken.is_set():
                if ended.is_set():
                    raise Ended
                block = buffer[:read]
                while block:
                    block = block[writes.write(block) :]
                copied += read
            os.fsync(writes.fileno())
        if copied != size and not broken.is_set():
            raise OSError(errno.EIO, f"changed while it was copied: {copied} of {size} bytes", str(source))
    except BaseException:
        broken.set()
        raise

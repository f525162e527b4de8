"""A file that HDF5 may write to on a full disk.

After a failed write, libhdf5 can neither close its file nor free the space, fails at every later save of the same
process, and crashes it at exit. So the error is hidden from it: the file accepts everything, drops what can't be
written, and raises the first error when its owner closes it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

PIECE_BYTES = 8 << 20
"""Bytes after which writing to the disk is started, so that it overlaps with copying the next ones into the page
cache."""


def sync_folder(path: Path) -> None:
    """Make the directory entries of a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class DurableFile:
    """A file object for h5py, truncated and open for writing.

    As a context manager it closes itself; if that raises no error, all bytes are on disk.

    Raises:
        OSError: from the constructor, and from `close` for any write that failed before.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._at = 0
        self.error: OSError | None = None
        """The first error; once it is set, nothing more is written."""

    def write(self, data: bytes | memoryview) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while self.error is None and done < len(view):
                written = os.pwrite(self._fd, view[done : done + PIECE_BYTES], self._at + done)
                self._begin_writing(self._at + done, written)
                done += written
        except OSError as error:
            self.error = error
        self._at += len(view)
        return len(view)

    def _begin_writing(self, at: int, count: int) -> None:
        """Have the kernel start to write a large piece now; otherwise the disk would be idle until `close`."""
        if count == PIECE_BYTES:
            with contextlib.suppress(OSError):  # the file system does not support this advice
                os.posix_fadvise(self._fd, at, count, os.POSIX_FADV_DONTNEED)

    def truncate(self, size: int) -> int:
        try:
            if self.error is None:
                os.ftruncate(self._fd, size)
        except OSError as error:
            self.error = error
        return size

    def read(self, size: int) -> bytes:
        """Exist for h5py, which treats an object without this method as a path."""
        data = os.pread(self._fd, size, self._at)
        self._at += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        count = os.preadv(self._fd, [buffer], self._at)
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.bytes}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Do nothing: nothing is buffered, and `close` waits for the disk."""

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Wait until everything is on disk, or raise the first error."""
        try:
            if self.error is not None:
                raise self.error
            os.fsync(self._fd)
        finally:
            os.close(self._fd)

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

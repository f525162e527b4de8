"""Reads the rows of one file in order: lines, a JSON array or Parquet, compressed or not, in constant memory.

Every defect of a file, at its beginning or in the middle, is a `UserError` that names file and row.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from specbatch.errors import UserError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
LINES = (".jsonl", ".ndjson")
SUFFIXES = (*LINES, ".json", ".parquet")

_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Unreadable:
    """A row that can't be read."""

    why: str


Row = bytes | dict[str, Any] | Unreadable | Any
"""A row: JSON as in the file, or a decoded object."""


def kind_of(path: Path) -> str:
    """Return the suffix of the file's format, without that of a compression; empty if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in (*LINES, ".json") else ""
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def open_file(name: str, path: Path, columns: Collection[str]) -> LinesFile | ArrayFile | ParquetFile:
    """Open a file by its kind.

    Args:
        name: name in the configuration, for people.
        columns: top-level columns that are read; unreadable values of others are left out.

    Raises:
        UserError: not even the beginning of a JSON file can be read.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        return ParquetFile(name, path, frozenset(columns))
    if kind == ".json" and _is_array(name, path):
        return ArrayFile(name, path)
    return LinesFile(name, path)


def unreadable(name: str, error: Exception, row: int | None = None) -> UserError:
    """Return the error for a file that can't be read, with the row at which it starts, if known."""
    where = f" from row {row} on" if row else ""
    said = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))
    return UserError(f"{name}: cannot be read{where}: {said or type(error).__name__}")


def _open(path: Path) -> BinaryIO:
    """Open the decompressed content of a file."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)  # type: ignore[return-value]
        case ".bz2":
            return bz2.open(path)  # type: ignore[return-value]
        case ".xz":
            return lzma.open(path)  # type: ignore[return-value]
        case ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _is_array(name: str, path: Path) -> bool:
    try:
        with _open(path) as file:
            head = file.read(4096)
    except _BROKEN as error:
        raise unreadable(name, error) from error
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


@dataclass(frozen=True)
class LinesFile:
    """A file with one JSON object in each line."""

    name: str
    path: Path

    def scan(self) -> tuple[int, str]:
        """Return the number of lines, and a hash of the decompressed bytes."""
        digest, lines, last = xxhash.xxh3_128(), 0, b"\n"
        try:
            with _open(self.path) as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    lines += block.count(b"\n")
                    last = block[-1:]
        except _BROKEN as error:
            raise unreadable(self.name, error, lines + 1) from error
        return lines + (last != b"\n"), digest.hexdigest()

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield each line as bytes, with its number."""
        number = 0
        try:
            with _open(self.path) as file:
                for number, line in enumerate(file, 1):
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        except _BROKEN as error:
            raise unreadable(self.name, error, number + 1) from error


@dataclass(frozen=True)
class ArrayFile:
    """A JSON file that is one array of objects. Rows are numbered by their place in it."""

    name: str
    path: Path

    def scan(self) -> tuple[int, str]:
        """Return the number of rows, and a hash of the decompressed bytes."""
        digest, count = xxhash.xxh3_128(), 0
        for _, __ in self._texts(digest):
            count += 1
        return count, digest.hexdigest()

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield each row's own JSON as bytes, with its number."""
        for number, text in self._texts(xxhash.xxh3_128()):
            yield number, text.encode("utf-8", "surrogatepass")

    def _texts(self, digest: Any) -> Iterator[tuple[int, str]]:
        """Yield the JSON text of each row; all bytes of the file are added to ``digest``."""
        number = 0
        try:
            with _open(self.path) as file:
                texts = io.TextIOWrapper(io.BufferedReader(_Hashed(file, digest), _BLOCK), "utf-8-sig", newline="")
                for text in _elements(texts):
                    number += 1
                    yield number, text
        except RecursionError as error:
            raise unreadable(self.name, RecursionError("nested too deeply"), number + 1) from error
        except (*_BROKEN, ValueError) as error:
            raise unreadable(self.name, error, number + 1) from error


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._digest.update(data)
        buffer[: len(data)] = data
        return len(data)


def _elements(file: io.TextIOBase, block: int = _BLOCK) -> Iterator[str]:
    """Yield the JSON texts of an array's elements; only the current one is in memory.

    Args:
        block: characters that are read at once.

    Raises:
        ValueError: the file is not one JSON array.
        RecursionError: an element is nested too deeply.
    """
    decoder, text, at, ended, first = json.JSONDecoder(), "", 0, False, True
    wanted = block

    def more() -> None:
        nonlocal text, at, ended
        read = file.read(wanted)
        ended = not read
        text, at = text[at:] + read, 0

    def next_sign() -> str:
        nonlocal at
        while True:
            while at < len(text) and text[at] in " \t\r\n":
                at += 1
            if at < len(text) or ended:
                return text[at : at + 1]
            more()

    if next_sign() != "[":
        raise ValueError("not a JSON array")
    at += 1
    while (sign := next_sign()) != "]" or not first:
        if not first:
            if sign == "]":
                break
            if sign != ",":
                raise ValueError(f"expected ',' or ']' after a row, found {sign!r}" if sign else "it ends too early")
            at += 1
            next_sign()
        wanted = block
        while True:
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                # A row that is not complete yet fails at the end of the text that was read, or in an unterminated
                # string.
                cut = error.pos >= len(text) - 12 or error.msg.startswith("Unterminated")
                if ended or not cut:
                    raise ValueError(f"{error.msg} at character {error.pos - at + 1} of the row") from error
            else:
                # A number may continue in the next block.
                if ended or isinstance(value, (dict, list, str)) or text[end : end + 1] in (*" \t\r\n,]",):
                    break
            wanted = max(wanted, len(text))  # each try doubles the size, so all tries together cost twice the last one
            more()
        yield text[at:end]
        at, first = end, False
    at += 1
    if next_sign():
        raise ValueError("there is something after the array's end")
    while not ended:
        more()


@dataclass(frozen=True)
class ParquetFile:
    """The rows of a Parquet file."""

    name: str
    path: Path
    columns: frozenset[str] = frozenset()
    """Columns that are read; a row with an unreadable one among them is unreadable."""

    def scan(self) -> tuple[int, str]:
        """Return the number of rows, and a hash of the file's bytes."""
        import pyarrow
        import pyarrow.parquet

        digest = xxhash.xxh3_128()
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                rows = file.metadata.num_rows
            with self.path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise unreadable(self.name, error) from error
        return rows, digest.hexdigest()

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield each row as an object, without the keys that it lacks."""
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            # Pages that have a checksum are compared with it: damage inside a text may still be text.
            with pyarrow.parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(batch_size=256):
                    for row in self._decoded(batch):
                        number += 1
                        yield number, row
        except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
            raise unreadable(self.name, error, number + 1) from error

    def _decoded(self, batch: Any) -> Iterator[Row]:
        """Yield the rows of a batch. A value that Python can't represent makes only its own row unreadable."""
        with contextlib.suppress(*_VALUES):
            return iter([without_nulls(row) for row in batch.to_pylist()])
        return self._decoded_singly(batch)

    def _decoded_singly(self, batch: Any) -> Iterator[Row]:
        for i in range(batch.num_rows):
            row: dict[str, Any] = {}
            why = ""
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    row[name] = column[i].as_py()
                except _VALUES as error:
                    if name in self.columns:
                        why = f"column {name}: {' '.join(str(error).split())}"
            yield Unreadable(why) if why else without_nulls(row)


_VALUES = (ValueError, OverflowError, ArithmeticError, NotImplementedError, ImportError, RecursionError)
"""Exceptions of pyarrow for values that Python can't represent: text that is not UTF-8, times beyond its calendar."""


def without_nulls(value: Any) -> Any:
    """A row of Arrow data without null values, by which Arrow represents missing keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value

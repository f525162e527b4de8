"""Where rows come from: files, directories of files, and names that `datasets` loads.

Lines are read here and not by `datasets`, so that a malformed one can be named by file and line number.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import xxhash

from specbatch.errors import UserError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
LINES = (".jsonl", ".ndjson")
SUFFIXES = (*LINES, ".json", ".parquet")

Row = bytes | dict[str, Any] | Any
"""A line as it stands in the file, or a row that was decoded already."""


class Source(Protocol):
    """Rows in a fixed order."""

    @property
    def name(self) -> str:
        """As the configuration names it, for people."""
        ...

    def scan(self) -> tuple[int, str]:
        """Number of rows, and a hash of their content."""
        ...

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Each row with its number as people count, from 1: of the line in a file of lines."""
        ...


def find_sources(names: Iterable[str]) -> list[Source]:
    """The sources that ``data.train`` or ``data.heldout`` name, in order; a directory's files by name.

    Raises:
        UserError: for a file that is missing or of an unknown kind, and a directory without a known one.
    """
    found: list[Source] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) and not _hidden(p, path))
            if not files:
                raise UserError(f"{name}: no file in this directory ends in {', '.join(SUFFIXES)}")
            found += [_file(str(p), p) for p in files]
        elif path.is_file():
            if not _kind(path):
                raise UserError(f"{name}: unknown kind of file; known are {', '.join(SUFFIXES)}, also with .gz or .zst")
            found.append(_file(name, path))
        elif path.is_absolute() or name.startswith(("./", "../", "~")) or _kind(path):
            raise UserError(f"{name}: no such file or directory")
        else:
            found.append(HubName(name))
    return found


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _kind(path: Path) -> str:
    """The suffix that says what is in the file, without that of a compression; empty if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in (*LINES, ".json") else ""
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def _file(name: str, path: Path) -> Source:
    kind = _kind(path)
    if kind == ".parquet":
        return _Parquet(name, path)
    if kind == ".json" and _is_array(name, path):
        return _Array(name, path)
    return _Lines(name, path)


def _open(path: Path) -> BinaryIO:
    """The file's bytes, decompressed."""
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


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"{name}: cannot be read: {error}")


_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


def _is_array(name: str, path: Path) -> bool:
    try:
        with _open(path) as file:
            head = file.read(4096)
    except _BROKEN as error:
        raise _unreadable(name, error) from error
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


@dataclass(frozen=True)
class _Lines:
    """One JSON object a line."""

    name: str
    path: Path

    def scan(self) -> tuple[int, str]:
        digest, lines, last = xxhash.xxh3_128(), 0, b"\n"
        try:
            with _open(self.path) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    lines += block.count(b"\n")
                    last = block[-1:]
        except _BROKEN as error:
            raise _unreadable(self.name, error) from error
        return lines + (last != b"\n"), digest.hexdigest()

    def rows(self) -> Iterator[tuple[int, Row]]:
        with _open(self.path) as file:
            for number, line in enumerate(file, 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


@dataclass(frozen=True)
class _Array:
    """A JSON file that is one array of objects. Rows are numbered by their place in it."""

    name: str
    path: Path

    def scan(self) -> tuple[int, str]:
        data = self._read()
        return len(self._parse(data)), xxhash.xxh3_128(data).hexdigest()

    def rows(self) -> Iterator[tuple[int, Row]]:
        yield from enumerate(self._parse(self._read()), 1)

    def _read(self) -> bytes:
        try:
            with _open(self.path) as file:
                return file.read()
        except _BROKEN as error:
            raise _unreadable(self.name, error) from error

    def _parse(self, data: bytes) -> list[Row]:
        try:
            return list(json.loads(data.decode("utf-8-sig")))
        except ValueError as error:
            raise _unreadable(self.name, error) from error


@dataclass(frozen=True)
class _Parquet:
    """The rows of a Parquet file."""

    name: str
    path: Path

    def scan(self) -> tuple[int, str]:
        import pyarrow
        import pyarrow.parquet

        digest = xxhash.xxh3_128()
        try:
            rows = pyarrow.parquet.ParquetFile(self.path).metadata.num_rows
            with self.path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except (OSError, pyarrow.ArrowException) as error:
            raise _unreadable(self.name, error) from error
        return rows, digest.hexdigest()

    def rows(self) -> Iterator[tuple[int, Row]]:
        import pyarrow.parquet

        number = 0
        for batch in pyarrow.parquet.ParquetFile(self.path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, without_nulls(row)


class HubName:
    """A data set that `datasets` finds by name: ``name`` or ``name:split``, split ``train`` if not said."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._loaded: Any = None

    def scan(self) -> tuple[int, str]:
        data = self._load()
        return len(data), str(data._fingerprint)

    def rows(self) -> Iterator[tuple[int, Row]]:
        for number, row in enumerate(self._load(), 1):
            yield number, without_nulls(row)

    def _load(self) -> Any:
        if self._loaded is None:
            import datasets
            from datasets.exceptions import DatasetsError

            repository, _, split = self.name.partition(":")
            try:
                self._loaded = datasets.load_dataset(repository, split=split or "train")
            except (OSError, ValueError, DatasetsError) as error:
                raise UserError(
                    f"{self.name}: neither a file, nor a directory, nor a name that `datasets` can load here: {error}"
                ) from error
        return self._loaded


def without_nulls(value: Any) -> Any:
    """A row of Arrow data without the keys that it lacks, which Arrow can only say by null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value

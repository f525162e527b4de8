"""Sources of rows: files, directories of files, and names that `datasets` loads.

Lines are read by `specbatch.corpus.files` and not by `datasets`, so that a malformed one can be named by file and line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from specbatch.corpus.files import SUFFIXES, Row, kind_of, open_file, unreadable, without_nulls
from specbatch.errors import UserError

__all__ = ["HubName", "Row", "Source", "find_sources"]


class Source(Protocol):
    """A source of rows in a fixed order."""

    @property
    def name(self) -> str:
        """Name of the source in the configuration."""
        ...

    def scan(self) -> tuple[int, str]:
        """Return the number of rows, and a hash of their content."""
        ...

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield each row with its number, from 1; in a file of lines, the number of the line."""
        ...


def find_sources(names: Iterable[str], columns: Collection[str] = ()) -> list[Source]:
    """Return the sources that ``data.train`` or ``data.heldout`` name, in order; files of a directory sorted by name.

    Args:
        columns: top-level columns that are read; unreadable values of others are left out.

    Raises:
        UserError: a file is missing or of an unknown kind, or a directory has no file of a known kind.
    """
    found: list[Source] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p) and not _hidden(p, path))
            if not files:
                raise UserError(f"{name}: no file in this directory ends in {', '.join(SUFFIXES)}")
            found += [open_file(str(p), p, columns) for p in files]
        elif path.is_file():
            if not kind_of(path):
                raise UserError(f"{name}: unknown kind of file; known are {', '.join(SUFFIXES)}, also with .gz or .zst")
            found.append(open_file(name, path, columns))
        elif path.is_absolute() or name.startswith(("./", "../", "~")) or kind_of(path):
            raise UserError(f"{name}: no such file or directory")
        else:
            found.append(HubName(name))
    return found


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


class HubName:
    """A data set that `datasets` finds by name: ``owner/name`` or ``owner/name/subset``, each with optional ``:split``.

    The split is ``train`` if not given.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._loaded: Any = None

    @property
    def parts(self) -> tuple[str, str | None, str]:
        """Repository (or directory), subset and split."""
        rest, _, split = self.name.partition(":")
        subset = None
        if not rest.startswith(("/", ".")) and rest.count("/") == 2:
            rest, _, subset = rest.rpartition("/")
        return rest, subset, split or "train"

    def scan(self) -> tuple[int, str]:
        """Return the number of rows, and the fingerprint by `datasets`."""
        data = self._load()
        return len(data), str(data._fingerprint)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield each row as an object, without the keys that it lacks."""
        import pyarrow

        data, number = self._load(), 0
        try:
            for number, row in enumerate(data, 1):
                yield number, without_nulls(row)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise unreadable(self.name, error, number + 1) from error

    def _load(self) -> Any:
        if self._loaded is None:
            import datasets
            from datasets.exceptions import DatasetsError

            repository, subset, split = self.parts
            try:
                self._loaded = datasets.load_dataset(repository, subset, split=split)
            except (OSError, ValueError, RuntimeError, LookupError, ImportError, DatasetsError) as error:
                raise UserError(
                    f"{self.name}: neither a file, nor a directory, nor a name that `datasets` can load here: {error}"
                ) from error
        return self._loaded

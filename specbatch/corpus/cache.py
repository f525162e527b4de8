"""The cache of prepared data: found by a key, put in place atomically, and continued after a crash."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from specbatch.config import Config
from specbatch.corpus.files import ArrayFile, LinesFile, ParquetFile
from specbatch.corpus.sources import Source
from specbatch.rundir import read_json, write_json

log = logging.getLogger(__name__)

SETTLED_S = 2.0
"""Seconds after a change in which a file might change again within the same tick of its file system's clock."""


def cache_root(config: Config) -> Path:
    """Return the directory of prepared data."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "specbatch"


def scanned(root: Path, source: Source) -> tuple[int, str]:
    """Return `Source.scan`, which is cached for a file until its size or modification time changes."""
    if not isinstance(source, LinesFile | ArrayFile | ParquetFile):
        return source.scan()
    if (known := remembered(root, source)) is not None:
        return known
    try:
        stat = source.path.stat()
    except OSError:
        return source.scan()  # raises the appropriate error
    rows, digest = source.scan()
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_S:
        memo, state = _memo(root, source, stat)
        with contextlib.suppress(OSError):
            write_json(memo, {"state": state, "rows": rows, "digest": digest, "path": str(source.path.absolute())})
    return rows, digest


def remembered(root: Path, source: Source) -> tuple[int, str] | None:
    """Return the cached scan of a file in its current state; None if it would have to be read."""
    if not isinstance(source, LinesFile | ArrayFile | ParquetFile):
        return None
    with contextlib.suppress(ValueError, OSError):
        memo, state = _memo(root, source, source.path.stat())
        found = read_json(memo)
        if isinstance(found, dict) and found.get("state") == state:
            return int(found["rows"]), str(found["digest"])
    return None


def _memo(
    root: Path, source: LinesFile | ArrayFile | ParquetFile, stat: os.stat_result
) -> tuple[Path, list[str | int]]:
    """Return the file with a cached scan, and what identifies the source's current state."""
    state: list[str | int] = [type(source).__name__, stat.st_dev, stat.st_ino, stat.st_size]
    state += [stat.st_mtime_ns, stat.st_ctime_ns]
    return root / "scans" / f"{xxhash.xxh3_64_hexdigest(os.fsencode(source.path.absolute()))}.json", state


@contextlib.contextmanager
def unfinished(place: Path) -> Iterator[Path]:
    """Provide the directory in which the content of ``place`` is built, with what a dead process has already built. Two
    processes that build the same at the same time have separate directories. The builder calls `put_in_place` at the
    end. After an error the content stays for the next process.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.with_name(f".{place.name}.lock")) as alone:
        folder = place.with_name(f".{place.name}.{'unfinished' if alone else secrets.token_hex(4)}")
        folder.mkdir(exist_ok=alone)
        try:
            yield folder
        finally:
            # Without a file of progress there is nothing to continue from.
            if folder.is_dir() and not (alone and any(path.suffix == ".json" for path in folder.iterdir())):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Tell whether the file is locked for this process; else another has it, or the file system has no locks.

    The file lies outside of the directory that it protects, which is renamed while the lock is held. Its holder removes
    it, so that whoever locks a removed file has nothing.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError:  # it is another user's
        yield False
        return
    try:
        alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = os.path.samestat(os.fstat(lock), os.stat(path))
        try:
            yield alone
        finally:
            if alone:
                path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def put_in_place(folder: Path, place: Path) -> None:
    """Rename a complete directory; one that another process made under the same key may exist already."""
    try:
        folder.rename(place)
    except OSError:
        if not (place / "part.json").is_file():
            raise
        log.info("prepared at the same time by another process path=%s", place)
        shutil.rmtree(folder, ignore_errors=True)

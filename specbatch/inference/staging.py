"""The target once a node: copied to a directory of the node before its engines start, which then share the copy.

The first engine of a node makes the copy under another name and renames it when it is complete; the others wait for it.
Each engine holds a lock on its copy, which the kernel releases when the process ends, so a copy without a lock may be
removed. The rest of specbatch, its messages and fingerprints use the target's original path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from specbatch.errors import AttemptError, EngineIncomplete, RunError, UserError
from specbatch.inference.target_copy import MANIFEST, CopiedTarget, Ended
from specbatch.memory_limit import memory_limit
from specbatch.mounts import IN_MEMORY, file_system
from specbatch.target import locate
from specbatch.units import bytes_text

logger = logging.getLogger(__name__)

FIELD = "slurm.stage_target"
SPARE_BYTES = 1 << 30
"""Room that is left to others."""
POLL_S = 0.5


@dataclass(frozen=True)
class _Held:
    """A copy that this process uses."""

    lock: int
    """Descriptor of the lock's file, locked in common with others."""
    copy: Path
    model: Path
    """The target's files in it."""


_base: Path | None = None
_held: dict[str, _Held] = {}
_guard = threading.Lock()


def use_stage(text: str) -> None:
    """Make engines of this process read their targets from copies below a directory of this node.

    Args:
        text: the directory, with variables of the environment as ``$TMPDIR``; empty: they read the targets themselves.

    Raises:
        UserError: a variable in it is not set here.
    """
    global _base
    _base = _expanded(text) if text else None


def stage(model: str | Path, ended: threading.Event) -> bool:
    """Copy a target to this node, or wait for the process that does; at once where that is done, or not wanted.

    Args:
        model: its directory, or its name in the hub's cache.
        ended: set to break it off.

    Returns:
        False if it was broken off.

    Raises:
        UserError: the node has no room, or the directory can't be used.
        AttemptError: the target can't be read.
    """
    with _guard:
        if _base is None or str(model) in _held:
            return True
        source = CopiedTarget(locate(model))
        while not ended.is_set():
            found = _hold(_base, source, ended)
            if found is not None:
                _held[str(model)] = found
                return True
            ended.wait(POLL_S)
        return False


def staged(model: str | Path) -> str | Path:
    """Return the directory from which this process's engines read a target."""
    held = _held.get(str(model))
    return held.model if held else model


@contextlib.contextmanager
def removed_afterwards(is_over: Callable[[], bool]) -> Iterator[None]:
    """At the end of the block, remove copies that no other process of the node uses.

    On a disk they stay for the run's next attempt, if there may be one. An engine that lost another of its nodes is
    started again in a moment.

    Args:
        is_over: whether the run needs no more engines.
    """
    try:
        yield
    except EngineIncomplete:
        raise
    except BaseException:
        _let_go(over=False)
        raise
    try:
        over = bool(_held) and is_over()
    except RunError:
        over = False
    _let_go(over)


def room(text: str, model: str | Path) -> str:
    """Whether this node has, or has room for, a copy of a target, in words.

    Raises:
        UserError: it has not, or the directory can't be used.
    """
    base, source = _expanded(text), CopiedTarget(locate(model))
    own = _own_folder(base)
    try:
        if source.is_whole(own / source.digest):
            return f"a whole copy in {own}"
        _check_room(own, source)
        return f"room for {bytes_text(source.total_bytes)} in {base}"
    finally:
        _leave(own)


def _hold(base: Path, source: CopiedTarget, ended: threading.Event) -> _Held | None:
    """A whole copy, which is made if it is missing; None if another process makes or removes it, or ``ended`` was
    set."""
    own = _own_folder(base)
    copy, path = own / source.digest, own / f"{source.digest}.lock"
    lock = _lock(path, fcntl.LOCK_EX)
    try:
        if lock is not None:
            if _is_current(lock, path) and not source.is_whole(copy):
                _make(own, source, copy, ended)
            # The lock is given up for a moment, in which another process may remove what it finds unused.
            fcntl.flock(lock, fcntl.LOCK_SH)
        else:
            lock = _lock(path, fcntl.LOCK_SH)
        if lock is not None and _is_current(lock, path):
            model = copy / source.name
            if not source.is_whole(copy):
                # Others read it, so it can't be made anew.
                logger.warning("somebody damaged the copy of the target, which is read itself instead path=%s", copy)
                model = source.folder
            held, lock = _Held(lock, copy, model), None
            return held
    except Ended:
        pass
    finally:
        if lock is not None:
            os.close(lock)
        _leave(own)
    return None


def _make(own: Path, source: CopiedTarget, copy: Path, ended: threading.Event) -> None:
    began = time.monotonic()
    shutil.rmtree(copy.with_suffix(".part"), ignore_errors=True)
    try:
        _check_room(own, source)
        logger.info("copying the target to this node from=%s to=%s bytes=%d", source.folder, copy, source.total_bytes)
        source.copy_to(copy, ended)
    except BaseException as error:
        _remove(copy)
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{FIELD}: {socket.gethostname()} ran out of room in {own.parent} for {source.folder}, which needs "
                f"{bytes_text(source.total_bytes)}; {_ELSEWHERE}"
            ) from error
        raise AttemptError(
            f"{FIELD}: {source.folder} can't be copied to {own.parent} of {socket.gethostname()}: {error}"
        ) from error
    seconds = time.monotonic() - began
    rate = bytes_text(int(source.total_bytes / max(seconds, 1e-3)))
    logger.info("the target is on this node seconds=%.1f rate=%s/s from=%s to=%s", seconds, rate, source.folder, copy)


def _let_go(over: bool) -> None:
    with _guard:
        for held in _held.values():
            own = held.copy.parent
            if not over and file_system(own) not in IN_MEMORY:
                logger.info("the copy of the target stays for the next attempt path=%s", held.copy)
            elif _flock(held.lock, fcntl.LOCK_EX):
                _remove(held.copy)
                logger.info("the copy of the target was removed path=%s", held.copy)
            os.close(held.lock)
            _leave(own)
        _held.clear()


def _remove(copy: Path) -> None:
    """Remove a copy and its lock, which is held."""
    # First what makes it whole, and last the lock: without it another process would begin a copy here.
    (copy / MANIFEST).unlink(missing_ok=True)
    for folder in (copy, copy.with_suffix(".part")):
        shutil.rmtree(folder, ignore_errors=True)
    copy.with_suffix(".lock").unlink(missing_ok=True)


def _check_room(own: Path, source: CopiedTarget) -> None:
    """Check that a copy fits. If it doesn't, unused copies of other targets are removed. In memory they always are,
    because the processes that left them were killed.

    Raises:
        UserError: it doesn't fit.
    """
    needed = source.total_bytes + SPARE_BYTES
    if file_system(own) in IN_MEMORY or _free(own) < needed:
        for path in own.glob("*.lock"):
            lock = _lock(path, fcntl.LOCK_EX)
            if lock is not None:
                if _is_current(lock, path) and path.stem != source.digest:
                    _remove(path.with_suffix(""))
                os.close(lock)
    if (free := _free(own)) < needed:
        raise UserError(
            f"{FIELD}: {socket.gethostname()} has {bytes_text(free)} left in {own.parent}, and a copy of "
            f"{source.folder} needs {bytes_text(needed)}; {_ELSEWHERE}"
        )


_ELSEWHERE = "name another directory of the nodes, or leave it out"


def _free(own: Path) -> int:
    free = shutil.disk_usage(own).free
    if file_system(own) in IN_MEMORY:
        free = min(free, psutil.virtual_memory().available, memory_limit())
    return free


def _expanded(text: str) -> Path:
    expanded = os.path.expandvars(text)
    if "$" in expanded or not expanded.startswith("/"):
        raise UserError(
            f"{FIELD}: {text} is {expanded or 'nothing'} on {socket.gethostname()}, which is no directory; name one, "
            "or set the variable in slurm.inference.setup"
        )
    return Path(expanded)


def _own_folder(base: Path) -> Path:
    """Return the directory of this user's copies, which other users can't enter or replace.

    Raises:
        UserError: it can't be made, or is not this user's.
    """
    node, own = socket.gethostname(), base / f"specbatch-{os.getuid()}"
    try:
        mode = base.stat().st_mode
        with contextlib.suppress(FileExistsError):
            own.mkdir(mode=0o700)
        there = own.lstat()
    except OSError as error:
        raise UserError(f"{FIELD}: {base} can't be used on {node}: {error.strerror}; {_ELSEWHERE}") from error
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise UserError(f"{FIELD}: {base} on {node} lets every user replace what others have there; {_ELSEWHERE}")
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid():
        raise UserError(
            f"{FIELD}: {own} on {node} is no directory of yours but uid {there.st_uid}'s, who could change what is in "
            f"it; have it removed, or {_ELSEWHERE}"
        )
    if there.st_mode & 0o077:
        own.chmod(0o700)
    return own


def _leave(own: Path) -> None:
    """Remove this user's directory if nothing is in it."""
    with contextlib.suppress(OSError):
        own.rmdir()


def _lock(path: Path, kind: int) -> int | None:
    """Descriptor of a file that is locked; None if another process has it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        # The directory was removed by the last process that had something in it.
        return None
    if _flock(descriptor, kind):
        return descriptor
    os.close(descriptor)
    return None


def _flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(lock: int, path: Path) -> bool:
    """Return whether the locked file is still the one at its path."""
    try:
        return os.fstat(lock).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False

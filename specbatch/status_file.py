"""``status.json`` of a run: the state of its newest attempt, written by the head or by whoever ends an attempt for it.

Every field has a default, so files of older versions can be read; fields that they lack are empty.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from specbatch.errors import UserError
from specbatch.rundir import RunDir, write_whole


class EngineStatus(msgspec.Struct, frozen=True):
    """An engine, as the dispatcher knows it."""

    name: str
    state: str
    claims: int = 0
    packs: int = 0
    """Number of packs that it stored."""
    tokens_per_s: float = 0.0
    last_heard_s: float = 0.0


class PackCounts(msgspec.Struct, frozen=True):
    """Packs of the window in each state."""

    free: int = 0
    claimed: int = 0
    stored: int = 0


class StoreUse(msgspec.Struct, frozen=True):
    """How full the store is."""

    stored_bytes: int = 0
    budget_bytes: int = 0


class Unwritten(msgspec.Struct, frozen=True):
    """A file that can't be written, while training continues."""

    what: str
    why: str


class VoidPack(msgspec.Struct, frozen=True):
    """A pack that trains as zero."""

    pack: str
    """``epoch.index``"""
    why: str


class AnswerCounts(msgspec.Struct, frozen=True):
    """Progress of answering prompts, over all attempts."""

    done: int = 0
    """Number of answers and refusals."""
    of: int = 0
    written: int = 0
    """Answers that `data` can read."""
    refused: dict[str, int] = {}
    """Prompts without an answer, by reason."""
    ways: dict[str, int] = {}
    """Number of conversations by the way in which their answers were written."""
    tokens: int = 0
    tokens_per_s: float = 0.0
    per_s: float = 0.0
    """Answers and refusals per second in this attempt."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an attempt."""

    state: str = ""
    """running, stopping, completed, stopped or failed."""
    stage: str = ""
    """answering, starting (engines), preparing (without engines), training, exporting, evaluating or done."""
    phase: str = ""
    """The dispatcher's."""
    step: int = 0
    """Number of steps that all ranks have trained."""
    steps: int = 0
    attempt: int = 0
    why: str = ""
    began: str = ""
    updated: str = ""
    """Time of writing."""
    ran_s: float = 0.0
    window: PackCounts = PackCounts()
    store: StoreUse = StoreUse()
    engines: tuple[EngineStatus, ...] = ()
    ranks: int = 0
    """Number of ranks that have joined."""
    waiting: tuple[str, ...] = ()
    """Descriptions of what ranks wait for."""
    lost: int = 0
    failed: int = 0
    refused: dict[str, int] = {}
    """Number of refused peers, messages and requests (`specbatch.dispatch.messages.Refusals`)."""
    troubles: tuple[Unwritten, ...] = ()
    void: tuple[VoidPack, ...] = ()
    idle: str = ""
    """Which components wait most of the time, and what to do about it."""
    answers: AnswerCounts | None = None
    """Progress of a run whose target answers prompts, also while it trains on the answers afterwards; else None."""


def read_status(path: Path) -> Status | None:
    """The status in a file; None if there is no such file.

    Raises:
        UserError: it is damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Status)
    except FileNotFoundError:
        return None
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: is not the status of a run: {error}") from error
    except msgspec.DecodeError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error


def is_complete(run_dir: RunDir) -> bool:
    """Return whether a run has finished training, export and evaluation as configured."""
    status = read_status(run_dir.status)
    return status is not None and status.state == "completed"


def write_status(path: Path, status: Status, *, durable: bool = True) -> None:
    """Replace the file atomically: no reader sees a part of it.

    Args:
        durable: whether it is on disk when this returns. If not, the older file may be back after a crash, but a file
            system's metadata server has only two requests to handle.
    """
    data = msgspec.json.format(msgspec.json.encode(status), indent=2) + b"\n"
    if durable:
        write_whole(path, data)
        return
    # One head writes at a time, so a fixed name suffices; created with its final mode.
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise

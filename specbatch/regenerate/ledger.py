"""The output of `regenerate`: whole lines only, so that the work can be broken off at any time and go on.

Each row of the input becomes one line, in order, either of the output or of `<output>.skipped.jsonl`. So the number
of lines in both is the number of rows done.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from specbatch.corpus.conversation import Rejected
from specbatch.errors import UserError
from specbatch.regenerate.rows import Row


class Ledger:
    """The files that a call writes; only one call has them at a time.

    Args:
        output: the file of conversations.
        settings: what its content depends on; kept beside it, and compared on the next call.

    Raises:
        UserError: another process writes the output, or it was made with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.output = output
        self.settings = settings
        self.settings_file = Path(f"{output}.settings.json")
        self.skipped_file = Path(f"{output}.skipped.jsonl")
        self.written = 0
        self.skipped: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        """Rows of the input that are dealt with."""
        return self.written + self.skipped.total()

    def __enter__(self) -> Ledger:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self.settings_file.open("a+b")
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.output}: another process is writing it; wait for it or end it") from error
            self._compare_settings()
            self.written = len(drop_partial_line(self.output))
            self.skipped = Counter(json.loads(line)["reason"] for line in drop_partial_line(self.skipped_file))
            self._output = self.output.open("ab")
            self._skips = self.skipped_file.open("ab")
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in (self._output, self._skips):
            os.fsync(file.fileno())
            file.close()
        self._lock.close()

    def append(self, row: Row, outcome: list[dict[str, Any]] | Rejected) -> None:
        """Writes what became of the next row."""
        if isinstance(outcome, Rejected):
            write_line(self._skips, {"place": row.place, "reason": outcome.reason, "detail": outcome.detail})
            self.skipped[outcome.reason] += 1
        else:
            write_line(self._output, {**row.other, "messages": outcome})
            self.written += 1

    def _compare_settings(self) -> None:
        self._lock.seek(0)
        before = self._lock.read()
        if not before:
            if self.output.exists() and self.output.stat().st_size:
                raise UserError(f"{self.output}: is there, and not from `regenerate`; choose another output")
            self._lock.write(json.dumps(self.settings, indent=2).encode() + b"\n")
            self._lock.flush()
            return
        old = json.loads(before)
        names = sorted(name for name in old.keys() | self.settings.keys() if old.get(name) != self.settings.get(name))
        if names:
            raise UserError(
                f"{self.output}: was begun with another {', '.join(names)}; choose another output, "
                f"or remove it together with {self.settings_file} and {self.skipped_file}"
            )


def write_line(file: IO[bytes], content: dict[str, Any]) -> None:
    """One line of JSON, handed to the system at once."""
    file.write(json.dumps(content, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
    file.flush()


def drop_partial_line(path: Path) -> list[bytes]:
    """The whole lines of a file; what follows the last of them is cut off: its writer died there."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return whole.splitlines()

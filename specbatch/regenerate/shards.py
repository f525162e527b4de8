"""Stores answers: each once, in the order of the input, in files that are written atomically.

    answers/00012.jsonl          the answers to the rows of one shard, in the input's order; what `data` reads
    shards/00012.json            written after it: its counts, and the rows that have no answer, with reasons
    shards/open/00012.<n>.jsonl  answers of attempt n to rows of a shard that is not whole yet, in the order they came

An attempt appends to files of its own, so that one that was cut off and is back spoils nothing. What stands there
twice is taken once, half a line is none, and only whole shards are renamed into place.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

import msgspec

from specbatch.config import Config
from specbatch.dispatch.messages import Answer
from specbatch.pack_manifest import PackId
from specbatch.regenerate.parquet import write_parquet
from specbatch.regenerate.rows import InputRow
from specbatch.rundir import RunDir, read_json, write_json, write_whole

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Answer).decode


class Superseded(OSError):
    """A later attempt has taken over, and writes these files."""


@dataclass
class Counts:
    """What was done, by all attempts."""

    written: int = 0
    """Answers that `data` can read."""
    refused: Counter[str] = field(default_factory=Counter)
    """Prompts without one, by reason."""
    ways: Counter[str] = field(default_factory=Counter)
    """How the answers of these conversations were written down."""
    tokens: int = 0
    """Number of generated tokens, including those of refused answers."""

    @property
    def done(self) -> int:
        """Number of answers and refusals."""
        return self.written + self.refused.total()

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        if answer.reason:
            self.refused[answer.reason] += 1
        else:
            self.written += 1
        self.ways.update(answer.ways)
        self.tokens += answer.tokens

    def add_all(self, other: dict[str, Any]) -> None:
        """Add the counts of a shard's record."""
        self.written += other["written"]
        self.refused.update(other["refused"])
        self.ways.update(other["ways"])
        self.tokens += other["tokens"]

    def as_json(self) -> dict[str, Any]:
        """Return the counts for the record of a shard and for the status."""
        return {
            "written": self.written,
            "refused": dict(self.refused),
            "ways": dict(self.ways),
            "tokens": self.tokens,
        }


class Shards:
    """Saves the answers of one attempt, after those that earlier attempts saved.

    Args:
        attempt: number of the attempt.
        rows: number of rows of the whole input.

    Raises:
        OSError: existing files can't be read.
    """

    def __init__(self, run_dir: RunDir, attempt: int, config: Config, rows: int) -> None:
        self._run_dir, self._attempt = run_dir, attempt
        asked = config.data.regenerate
        self._each, self._answers, self._kind = asked.rows_per_shard, max(1, asked.answers), asked.format
        self._rows = rows
        self.folder = run_dir.answers
        self._records, self._open_files = run_dir.shards, run_dir.shards / "open"
        for folder in (self.folder, self._open_files):
            folder.mkdir(parents=True, exist_ok=True)
        self.counts = Counts()
        self._whole: set[int] = set()
        self._kept: dict[int, set[PackId]] = {}
        """Saved answers of unfinished shards."""
        self._files: dict[int, IO[bytes]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._writing: list[Future[None]] = []
        self._read()

    @property
    def total(self) -> int:
        """Number of answers for the whole input."""
        return self._rows * self._answers

    def missing(self, rows: Iterable[InputRow]) -> Iterator[tuple[PackId, InputRow]]:
        """Yield unfinished rows in order, each as often as it has to be answered."""
        for row in rows:
            shard = self._shard(row.number)
            if shard in self._whole:
                continue
            for answer in range(self._answers):
                if (row.number, answer) not in self._kept.get(shard, ()):
                    yield (row.number, answer), row

    def keep(self, answer: Answer) -> None:
        """Save an answer; after the last one of a shard, the whole shard is written soon afterwards.

        Raises:
            OSError: it can't be written, or a later attempt writes here already.
        """
        self._raise_what_failed()
        shard = self._shard(answer.prompt[0])
        file = self._files.get(shard)
        if file is None:
            if self._run_dir.superseded(self._attempt):
                raise Superseded(f"attempt {self._attempt + 1} has taken over")
            file = self._files[shard] = (self._open_files / f"{shard:05d}.{self._attempt}.jsonl").open("ab")
        file.write(_encode(answer) + b"\n")
        file.flush()
        self.counts.add(answer)
        kept = self._kept.setdefault(shard, set())
        kept.add(answer.prompt)
        if len(kept) == self._size(shard):
            self._close(shard)

    def finish(self) -> None:
        """Wait until all finished shards are in place; must be called at the end of the attempt.

        Raises:
            OSError: one can't be written.
        """
        self._writer.shutdown()
        self._raise_what_failed()
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()

    def _shard(self, row: int) -> int:
        return (row - 1) // self._each

    def _size(self, shard: int) -> int:
        """Return the number of answers of a finished shard."""
        return (min(self._rows, (shard + 1) * self._each) - shard * self._each) * self._answers

    def _close(self, shard: int) -> None:
        del self._kept[shard]
        if (file := self._files.pop(shard, None)) is not None:
            file.close()
        self._whole.add(shard)
        self._writing.append(self._writer.submit(self._write, shard))

    def _raise_what_failed(self) -> None:
        done = [future for future in self._writing if future.done()]
        self._writing = [future for future in self._writing if not future.done()]
        for future in done:
            future.result()

    # Reading existing files.

    def _read(self) -> None:
        for path in self._records.glob("*.json"):
            self.counts.add_all(read_json(path))
            self._whole.add(int(path.stem))
        for shard in sorted({int(path.name.split(".")[0]) for path in self._open_files.glob("*.jsonl")}):
            if shard in self._whole:  # the attempt died between writing the record and deleting these files
                self._remove_open(shard)
                continue
            kept = self._kept[shard] = set()
            for answer in self._answers_of(shard):
                kept.add(answer.prompt)
                self.counts.add(answer)
            if len(kept) == self._size(shard):
                self._close(shard)

    def _answers_of(self, shard: int) -> Iterator[Answer]:
        """Yield the saved answers of a shard over all attempts, each once."""
        seen: set[PackId] = set()
        for path in sorted(self._open_files.glob(f"{shard:05d}.*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # the writer died here
                    answer = _decode(line)
                    if answer.prompt not in seen:
                        seen.add(answer.prompt)
                        yield answer

    def _remove_open(self, shard: int) -> None:
        for path in self._open_files.glob(f"{shard:05d}.*.jsonl"):
            path.unlink(missing_ok=True)

    # Writing finished shards.

    def _write(self, shard: int) -> None:
        if self._run_dir.superseded(self._attempt):
            raise Superseded(f"attempt {self._attempt + 1} has taken over")
        counts, refused = Counts(), []
        found = sorted(self._answers_of(shard), key=lambda answer: answer.prompt)
        for answer in found:
            counts.add(answer)
            if answer.reason:
                refused.append({"row": answer.prompt[0], "reason": answer.reason, "detail": answer.detail})
        rows = [answer.row for answer in found if not answer.reason]
        path = self.folder / f"{shard:05d}.{self._kind}"
        if self._kind == "parquet":
            write_parquet(path, rows)
        else:
            write_whole(path, b"".join(row + b"\n" for row in rows))
        write_json(self._records / f"{shard:05d}.json", {**counts.as_json(), "without_answer": refused})
        self._remove_open(shard)


def finished(run_dir: RunDir, config: Config) -> bool:
    """Return whether all shards of the run's answers are in place."""
    record = read_json(run_dir.questions)
    if record is None:
        return False
    shards = -(-record["rows"] // config.data.regenerate.rows_per_shard)
    return all((run_dir.shards / f"{shard:05d}.json").exists() for shard in range(shards))

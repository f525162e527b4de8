"""The first rows of the data, tried before a job is queued: most mistakes in data are in all of its rows."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from specbatch.config import Config
from specbatch.corpus.convert import BATCH, ROWS_WORTH_A_PROCESS, Conversion
from specbatch.corpus.files import LINES, Row
from specbatch.corpus.forms import RowReader
from specbatch.corpus.judge import judge
from specbatch.corpus.prepare import ROW_BYTES, is_prepared, rows_of
from specbatch.corpus.prepared import Corpus
from specbatch.corpus.samples import Converted
from specbatch.corpus.sources import find_sources
from specbatch.corpus.summary import Part, SourcePart, joined
from specbatch.corpus.tokenizer import load_tokenizer, tokenizer_size
from specbatch.corpus.write import PartWriter
from specbatch.errors import UserError
from specbatch.rundir import write_json

FIRST_ROWS = 500
"""Rows of the training data, and of the held-out data, that are tried: two seconds on one core, which is acceptable on
a login node."""
COMPRESSED = 4
"""Assumed compression ratio of a file of conversations."""


@dataclass(frozen=True)
class FirstRows:
    """What the first rows say about all rows."""

    warnings: list[str]
    whole: bool
    """Whether these are all rows."""
    seconds_a_byte: float
    """Seconds that one process takes per byte of decompressed data."""


def try_first_rows(config: Config, look: Callable[[Corpus, bool], None] | None = None) -> FirstRows:
    """Convert the first rows as `prepare` would, and discard the result.

    Args:
        look: is called with the samples, and whether these are all of the data.

    Returns:
        what they say; with a warning if too many of them, but not all, are unusable, and there are more rows.

    Raises:
        UserError: none of the rows gives a sample, or files or tokenizer can't be read.
    """
    warnings: list[str] = []
    pace = _Pace()
    size = tokenizer_size(load_tokenizer(config))
    with tempfile.TemporaryDirectory(prefix="specbatch-") as root:
        found = [
            _first(config, title, names, Path(root) / title, warnings, pace)
            for title, names in (("training", config.data.train), ("held-out", config.data.heldout))
            if names
        ]
        whole = not any(more for _, more in found)
        if look is not None:
            parts = [part for part, _ in found]
            heldout = Corpus(parts[1], size) if parts[1:] else None
            look(Corpus(parts[0], size, heldout), whole)
    return FirstRows(warnings, whole, pace.seconds / max(pace.bytes, 1))


class _Pace:
    """Measures the time per byte of rows, without the first ones, which include one-time costs."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        self._given = 0

    def count(self, rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """Yield the same rows, and count their bytes."""
        for place, row in rows:
            self._given += len(row) if isinstance(row, bytes) else len(repr(row))
            yield place, row

    def timed(self, batches: Iterator[list[Converted]]) -> Iterator[list[Converted]]:
        """Yield the same batches of results, and measure their time."""
        begun = time.perf_counter()
        for number, batch in enumerate(batches):
            now = time.perf_counter()
            if number or len(batch) < BATCH:
                self.seconds, self.bytes = self.seconds + now - begun, self.bytes + self._given
            self._given = 0
            yield batch
            begun = time.perf_counter()


def left_to_do(config: Config, first: FirstRows) -> tuple[float, float] | None:
    """Estimate the seconds of preparing the data, by one process and by as many as are used here; None if it is
    prepared already. The size of compressed files is assumed."""
    if is_prepared(config):
        return None
    total = 0
    for source in find_sources([*config.data.train, *config.data.heldout], RowReader(config.data).columns):
        path: Path | None = getattr(source, "path", None)
        if path is None:
            total += source.scan()[0] * ROW_BYTES
        else:
            total += path.stat().st_size * (COMPRESSED if path.suffix not in (*LINES, ".json") else 1)
    alone = total * first.seconds_a_byte
    workers = min(config.data.workers or len(os.sched_getaffinity(0)), total // ROW_BYTES // ROWS_WORTH_A_PROCESS)
    return alone, alone / max(1, workers)


def _first(
    config: Config, title: str, names: list[str], folder: Path, warnings: list[str], pace: _Pace
) -> tuple[Part, bool]:
    """Return the part made of the first rows, and whether there are more."""
    folder.mkdir()
    rows = rows_of(find_sources(names, RowReader(config.data).columns))
    with (
        Conversion(config, FIRST_ROWS, prompts=title == "held-out", workers=0) as conversion,
        PartWriter(folder, conversion.tokenizer_size) as writer,
    ):
        for batch in pace.timed(conversion.batches(pace.count(islice(rows, FIRST_ROWS)))):
            writer.add(batch)
    part, more = writer.part, next(rows, None) is not None
    write_json(folder / "part.json", {})
    source = SourcePart(names[0], str(folder), 0, part.rows, part.samples, part.tokens, part.loss_tokens)
    whole = joined([part], [source], folder)
    try:
        judge(config, title, whole)
    except UserError as error:
        if not (more and (part.samples or part.prompts)):
            raise
        warnings.append(f"of the first {FIRST_ROWS} rows, {str(error).splitlines()[0].rstrip(':')}")
    return whole, more

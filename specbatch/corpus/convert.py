"""Converts rows to samples in several processes, in the order of rows, with the same result for any number of them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import pickle
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from types import TracebackType
from typing import Any

from specbatch.config import Config
from specbatch.config.algorithms import algorithm_class
from specbatch.corpus.files import Row
from specbatch.corpus.images import ImageExpander
from specbatch.corpus.samples import Converted, Converter
from specbatch.corpus.tokenizer import end_ids, load_tokenizer, tokenizer_size
from specbatch.errors import RunError, UserError

BATCH, BATCH_BYTES = 64, 1 << 20
"""Most rows that are sent to a process at once, and bytes that are enough."""
ROWS_WORTH_A_PROCESS = 4000
"""Rows for each process below which another process costs more than it saves."""

_converter: Converter | UserError | None = None
"""The converter of a process in the pool, or the reason why it has none."""


class Conversion:
    """Converts rows in order, in several processes where that saves time. Then only these load the tokenizer.

    Args:
        total: number of rows, in units of rows of usual length.
        prompts: whether to keep the prompts, too.
        workers: processes besides this one. Default: by the configuration and ``total``.
    """

    def __init__(self, config: Config, total: int, *, prompts: bool, workers: int | None = None) -> None:
        self._config, self._prompts = config, prompts
        if workers is None:
            allowed = config.data.workers or len(os.sched_getaffinity(0))
            workers = min(allowed, total // ROWS_WORTH_A_PROCESS)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            context = _context(config)
            self._pool = ProcessPoolExecutor(workers, context, _start, (config, prompts))

    def __enter__(self) -> Conversion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @cached_property
    def tokenizer_size(self) -> int:
        """Number of ids, from 0 to the highest of the tokenizer.

        Raises:
            UserError: the tokenizer can't be loaded.
            RunError: one of the processes was killed.
        """
        if self._pool is None:
            return tokenizer_size(self._own.template.tokenizer)
        with self._unless_killed():
            return self._pool.submit(_size).result()

    def batches(self, rows: Iterator[tuple[str, Row]]) -> Iterator[list[Converted]]:
        """Convert rows, and yield a batch at a time.

        Raises:
            UserError: the tokenizer can't be loaded.
            RunError: one of the processes was killed.
        """
        if self._pool is None:
            for batch in iter(lambda: list(islice(rows, BATCH)), []):
                yield self._own.convert_all(batch)
            return
        waiting: deque[Future[list[Converted]]] = deque()
        with self._unless_killed():
            for sent in _batches(rows):
                waiting.append(self._pool.submit(_convert, sent))
                if len(waiting) >= 4 * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    @cached_property
    def _own(self) -> Converter:
        return new_converter(self._config, load_tokenizer(self._config), prompts=self._prompts)

    @contextmanager
    def _unless_killed(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            raise RunError(
                "a process that prepares data was killed, most likely since memory ran out: "
                f"try fewer than {self._workers} data.workers"
            ) from error


def new_converter(config: Config, tokenizer: Any, *, prompts: bool) -> Converter:
    """Return a converter for the configuration."""
    teaches = algorithm_class(config.draft.algorithm).teaches
    images = ImageExpander(config) if config.data.images else None
    return Converter(tokenizer, end_ids(config), config.data, prompts, teaches, images)


def _context(config: Config) -> multiprocessing.context.BaseContext:
    """Return how processes are started. Importing the libraries takes seconds, so it is done once for all processes,
    unless they may need transformers with torch: for images, the target's own code, or the user's."""
    if config.target.trust_remote_code or config.data.images or config.data.transform:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "specbatch.corpus.preloaded"])
    return context


def _start(config: Config, prompts: bool) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process gets it, too, and ends this one
    global _converter
    try:
        _converter = new_converter(config, load_tokenizer(config), prompts=prompts)
    except UserError as error:
        _converter = error


def _started() -> Converter:
    """Return the converter of this process of the pool.

    Raises:
        UserError: it could not be made.
    """
    assert _converter is not None
    if isinstance(_converter, UserError):
        raise _converter
    return _converter


def _size() -> int:
    return tokenizer_size(_started().template.tokenizer)


def _batches(rows: Iterator[tuple[str, Row]]) -> Iterator[list[tuple[str, bytes]]]:
    """Yield batches of rows for a process, small enough to take little memory."""
    batch: list[tuple[str, bytes]] = []
    size = 0
    for place, row in rows:
        batch.append((place, pickle.dumps(row, pickle.HIGHEST_PROTOCOL)))
        size += len(batch[-1][1])
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _convert(batch: list[tuple[str, bytes]]) -> list[Converted]:
    return _started().convert_all([(place, pickle.loads(row)) for place, row in batch])

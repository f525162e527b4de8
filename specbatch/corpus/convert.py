"""Converts rows to samples in several processes, in the order of rows, with the same result for any number of them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from specbatch.config import Config
from specbatch.config.algorithms import algorithm_class
from specbatch.corpus.files import Row
from specbatch.corpus.images import ImageExpander
from specbatch.corpus.samples import Converted, Converter
from specbatch.corpus.tokenizer import end_ids, load_tokenizer
from specbatch.errors import RunError

BATCH, BATCH_BYTES = 64, 1 << 20
"""Most rows that are sent to a process at once, and bytes that are enough."""
ROWS_WORTH_A_PROCESS = 4000
"""Rows for each process below which another process costs more than it saves."""

_converter: Converter | None = None
"""The converter of a process in the pool."""


def convert_rows(
    config: Config,
    tokenizer: Any,
    rows: Iterator[tuple[str, Row]],
    total: int,
    *,
    prompts: bool,
    workers: int | None = None,
) -> Iterator[list[Converted]]:
    """Convert rows in order, a batch at a time.

    Args:
        tokenizer: the target's tokenizer; other processes load their own.
        total: number of rows, in units of rows of usual length.
        prompts: whether to keep the prompts, too.
        workers: processes besides this one. Default: by the configuration and ``total``.

    Raises:
        RunError: one of the processes was killed.
    """
    if workers is None:
        allowed = config.data.workers or len(os.sched_getaffinity(0))
        workers = min(allowed, total // ROWS_WORTH_A_PROCESS)
    if workers < 2:
        converter = new_converter(config, tokenizer, prompts=prompts)
        for batch in iter(lambda: list(islice(rows, BATCH)), []):
            yield converter.convert_all(batch)
        return
    context = multiprocessing.get_context("forkserver")
    # Importing the libraries takes seconds, so it is done once for all processes.
    context.set_forkserver_preload([__name__, "transformers.models.auto.tokenization_auto"])
    pool = ProcessPoolExecutor(workers, context, _start, (config, prompts))
    waiting: deque[Future[list[Converted]]] = deque()
    try:
        for sent in _batches(rows):
            waiting.append(pool.submit(_convert, sent))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that prepares data was killed, most likely since memory ran out: "
            f"try fewer than {workers} data.workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def new_converter(config: Config, tokenizer: Any, *, prompts: bool) -> Converter:
    """Return a converter for the configuration."""
    teaches = algorithm_class(config.draft.algorithm).teaches
    images = ImageExpander(config) if config.data.images else None
    return Converter(tokenizer, end_ids(config), config.data, prompts, teaches, images)


def _start(config: Config, prompts: bool) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process gets it, too, and ends this one
    global _converter
    _converter = new_converter(config, load_tokenizer(config), prompts=prompts)


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
    assert _converter is not None
    return _converter.convert_all([(place, pickle.loads(row)) for place, row in batch])

"""Rows to samples by several processes, in the order of the rows, with the same result for any number of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from specbatch.config import Config
from specbatch.corpus.samples import Converted, Converter
from specbatch.corpus.sources import Row
from specbatch.corpus.tokenizer import end_ids, load_tokenizer
from specbatch.errors import RunError

BATCH = 64
"""Rows that a process is given at once."""
ROWS_WORTH_A_PROCESS = 4000
"""Below so many rows for each, starting another process costs more than it saves."""

_converter: Converter | None = None
"""The one of a process of the pool."""


def convert_rows(
    config: Config,
    tokenizer: Any,
    rows: Iterator[tuple[str, Row]],
    total: int,
    *,
    prompts: bool,
    workers: int | None = None,
) -> Iterator[list[Converted]]:
    """Convert rows in their order, a batch at a time.

    Args:
        tokenizer: the target's; other processes load their own.
        total: how many rows there are.
        prompts: keep the prompts too.
        workers: exactly so many processes besides this one; from the configuration and ``total`` if not given.

    Raises:
        RunError: if one of the processes was killed.
    """
    if workers is None:
        allowed = config.data.workers or len(os.sched_getaffinity(0))
        workers = min(allowed, total // ROWS_WORTH_A_PROCESS)
    batches = iter(lambda: list(islice(rows, BATCH)), [])
    if workers < 2:
        converter = Converter(tokenizer, end_ids(config), config.data, prompts)
        for batch in batches:
            yield [converter.convert(place, row) for place, row in batch]
        return
    context = multiprocessing.get_context("forkserver")
    # The libraries take seconds to import: once, not once a process.
    context.set_forkserver_preload([__name__, "transformers.models.auto.tokenization_auto"])
    pool = ProcessPoolExecutor(workers, context, _start, (config, prompts))
    waiting: deque[Future[list[Converted]]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_convert, batch))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that prepares data was killed, most likely for want of memory: "
            f"try fewer than {workers} data.workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(config: Config, prompts: bool) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it as well, and ends this one
    global _converter
    _converter = Converter(load_tokenizer(config), end_ids(config), config.data, prompts)


def _convert(batch: list[tuple[str, Row]]) -> list[Converted]:
    assert _converter is not None
    return [_converter.convert(place, row) for place, row in batch]

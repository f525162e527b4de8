"""The rows of the input through the engines into the output, in order."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specbatch.corpus.conversation import Rejected
from specbatch.corpus.sources import Source, find_sources
from specbatch.errors import UserError
from specbatch.inference.server import SGLangServer
from specbatch.regenerate.engines import start_engines
from specbatch.regenerate.ledger import Ledger
from specbatch.regenerate.options import Progress, Regenerate, Summary
from specbatch.regenerate.rows import Row, read_rows
from specbatch.regenerate.speaker import Speaker
from specbatch.target import locate

logger = logging.getLogger(__name__)

LOOK_AHEAD = 8
"""Conversations that may be begun before the first of them is finished, as a multiple of those asked at once: a long
one does not hold up the others, and little waits behind it."""

Outcome = list[dict[str, Any]] | Rejected
"""What became of a row: its conversation, or why there is none."""


def run(options: Regenerate, progress: Progress | None) -> Summary:
    """As `specbatch.regenerate.regenerate` says."""
    sources = find_sources(options.input)
    scans = [source.scan() for source in sources]
    total = sum(rows for rows, _ in scans)
    if total == 0:
        raise UserError(f"input: {', '.join(options.input)}: no rows")
    with Ledger(Path(options.output), settings(options, [digest for _, digest in scans])) as ledger:
        if ledger.rows >= total:
            return Summary(ledger.rows, ledger.written, dict(ledger.skipped), 0, 0.0)
        speaker = Speaker(options)
        logger.info("regenerating rows=%d done=%d engines=%d", total, ledger.rows, options.engines)
        at_once = options.engines * options.batch_size
        # On an error the engines end first: nobody then waits for an answer that takes long.
        with ThreadPoolExecutor(at_once) as pool, start_engines(options, speaker) as servers:
            started = time.monotonic()
            for row, outcome in converse_all(sources, ledger.rows, speaker, servers, pool):
                ledger.append(row, outcome)
                if progress is not None:
                    progress(ledger.rows, total, speaker.generated_tokens / (time.monotonic() - started))
            seconds = time.monotonic() - started
        return Summary(ledger.rows, ledger.written, dict(ledger.skipped), speaker.generated_tokens, seconds)


def settings(options: Regenerate, digests: list[str]) -> dict[str, Any]:
    """What the output depends on: a call with other settings must not go on with it.

    Args:
        digests: of the input's content.
    """
    free = {"output", "engines", "tensor_parallel", "threads", "batch_size", "start_timeout_s", "sglang"}
    given = {name: value for name, value in asdict(options).items() if name not in free}
    return given | {"target": str(locate(options.target)), "input": digests}


def converse_all(
    sources: list[Source], done: int, speaker: Speaker, servers: list[SGLangServer], pool: ThreadPoolExecutor
) -> Iterator[tuple[Row, Outcome]]:
    """The rows behind the first `done`, in order, each with what became of it."""

    def converse(row: Row) -> Outcome:
        if row.problem is not None:
            return row.problem
        try:
            return speaker.converse(row, servers[row.number % len(servers)])
        except Rejected as problem:
            return problem

    most = LOOK_AHEAD * len(servers) * speaker.options.batch_size
    waiting: deque[tuple[Row, Future[Outcome]]] = deque()
    try:
        for row in read_rows(sources):
            if row.number <= done:
                continue
            waiting.append((row, pool.submit(converse, row)))
            while waiting and (len(waiting) >= most or waiting[0][1].done()):
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()

"""Conversations in, the same conversations with the target's own answers out.

A draft learns to propose what the target would say, so it should be trained on what the target said. User and system
turns are kept; each assistant turn is written anew by the target, after what it has said before; a conversation that
ends on a user turn gets its answer. The output's rows stand in the input's order, and the work may be broken off at
any time: the next call goes on behind the last whole row.

An answer that reaches `max_new_tokens` has no end, but a chat template would write one, and it would be trained
although the target never said it. So such a conversation is skipped, or kept with a mark that the corpus heeds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.errors import UserError
from specbatch.regenerate.ledger import Ledger
from specbatch.regenerate.options import Regenerate
from specbatch.regenerate.rows import Row, Skip, read_rows

if TYPE_CHECKING:
    from specbatch.inference.server import SGLangServer
    from specbatch.regenerate.speaker import Speaker

__all__ = ["Regenerate", "Summary", "regenerate"]

logger = logging.getLogger(__name__)

LOOK_AHEAD = 8
"""Conversations that may be begun before the first of them is finished, as a multiple of those asked at once: a long
one does not hold up the others, and little waits behind it."""

Outcome = list[dict[str, Any]] | Skip
"""What became of a row: its conversation, or why there is none."""


@dataclass
class Summary:
    """What was done."""

    rows: int
    """Rows of the input that are dealt with, by this call and earlier ones."""
    written: int
    """Conversations in the output."""
    skipped: dict[str, int]
    """Rows left out, by reason."""
    generated_tokens: int
    """Tokens that the target generated in this call, those of skipped rows included."""
    seconds: float
    """Seconds that this call generated for; the engines' start is not in it."""


def regenerate(options: Regenerate, progress: Callable[[int, int, float], None] | None = None) -> Summary:
    """Writes `options.output`, and in `<output>.skipped.jsonl` the place and the reason of each row left out.

    Args:
        options: what to do.
        progress: called after each row with the rows done, the rows in all, and the tokens generated per second.

    Raises:
        UserError: target or input can't be read, or the output belongs to another call.
        RunError: an engine ended; the same call goes on where this one stopped.
    """
    total = sum(1 for _ in read_rows(options.input, options.max_rows))
    if total == 0:
        raise UserError(f"input: {', '.join(options.input)}: no rows")
    with Ledger(Path(options.output), settings(options)) as ledger:
        if ledger.rows >= total:
            return Summary(ledger.rows, ledger.written, dict(ledger.skipped), 0, 0.0)
        from specbatch.regenerate.speaker import Speaker  # brings transformers

        speaker = Speaker(options)
        logger.info("regenerating rows=%d done=%d engines=%d", total, ledger.rows, options.engines)
        at_once = options.engines * options.batch_size
        # The engines end before the threads that ask them are waited for: none of them waits for an answer in vain.
        with ThreadPoolExecutor(at_once) as pool, start_engines(options, speaker.max_tokens) as servers:
            started = time.monotonic()
            for row, outcome in converse_all(options, ledger.rows, speaker, servers, pool):
                ledger.append(row, outcome)
                if progress is not None:
                    progress(ledger.rows, total, speaker.generated_tokens / (time.monotonic() - started))
            seconds = time.monotonic() - started
        return Summary(ledger.rows, ledger.written, dict(ledger.skipped), speaker.generated_tokens, seconds)


def settings(options: Regenerate) -> dict[str, Any]:
    """What the output depends on: a call with other settings must not go on with it."""
    free = {"output", "engines", "tensor_parallel", "threads", "batch_size", "max_rows", "sglang"}
    return {name: value for name, value in asdict(options).items() if name not in free}


def converse_all(
    options: Regenerate, done: int, speaker: Speaker, servers: list[SGLangServer], pool: ThreadPoolExecutor
) -> Iterator[tuple[Row, Outcome]]:
    """The rows behind the first `done`, in order, each with what became of it."""

    def converse(row: Row) -> Outcome:
        if row.problem is not None:
            return Skip(row.problem)
        try:
            return speaker.converse(row, servers[row.number % len(servers)])
        except Skip as reason:
            return reason

    most = LOOK_AHEAD * len(servers) * options.batch_size
    waiting: deque[tuple[Row, Future[Outcome]]] = deque()
    try:
        for row in read_rows(options.input, options.max_rows):
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


@contextlib.contextmanager
def start_engines(options: Regenerate, max_tokens: int) -> Iterator[list[SGLangServer]]:
    """All engines, started side by side; their logs lie beside the output."""
    from specbatch.inference.server import SGLangServer

    servers = [
        SGLangServer(
            engine_arguments(options, index, max_tokens),
            Path(f"{options.output}.engine-{index}.log"),
            device_environment(options, index),
            options.threads,
        )
        for index in range(options.engines)
    ]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(options.engines) as starter:
        for started in [starter.submit(stack.enter_context, server) for server in servers]:
            started.result()
        yield servers


def engine_arguments(options: Regenerate, index: int, max_tokens: int) -> dict[str, Any]:
    """SGLang's arguments for engine number `index`; the user's own win."""
    arguments: dict[str, Any] = {
        "model_path": options.target,
        "dtype": options.dtype,
        "trust_remote_code": options.trust_remote_code,
        "tp_size": options.tensor_parallel,
        "skip_tokenizer_init": True,
        "context_length": max_tokens,
        "max_running_requests": options.batch_size,
        "random_seed": options.seed + index,
    }
    return arguments | options.sglang


def device_environment(options: Regenerate, index: int) -> dict[str, str]:
    """What gives engine number `index` GPUs of its own; nothing on a machine without.

    Raises:
        UserError: there are too few.
    """
    from specbatch.inference.server import accelerator_available

    if not accelerator_available():
        return {}
    need = options.engines * options.tensor_parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(need)]
    if len(names) < need:
        raise UserError(
            f"engines: {options.engines} with tensor_parallel: {options.tensor_parallel} need {need} GPUs, and "
            f"CUDA_VISIBLE_DEVICES names {len(names)}: engines: {len(names) // options.tensor_parallel} would do"
        )
    own = names[index * options.tensor_parallel : (index + 1) * options.tensor_parallel]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}

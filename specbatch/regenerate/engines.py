"""The engines that speak as the target, on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from specbatch.errors import UserError
from specbatch.inference.server import SGLangServer, accelerator_available
from specbatch.regenerate.options import Regenerate
from specbatch.regenerate.speaker import Speaker


@contextlib.contextmanager
def start_engines(options: Regenerate, speaker: Speaker) -> Iterator[list[SGLangServer]]:
    """All engines, started side by side; their logs lie beside the output."""
    servers = [
        SGLangServer(
            engine_arguments(options, index, speaker),
            Path(f"{options.output}.engine-{index}.log"),
            device_environment(options, index),
            options.threads,
            start_timeout_s=options.start_timeout_s,
        )
        for index in range(options.engines)
    ]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(options.engines) as starter:
        for started in [starter.submit(stack.enter_context, server) for server in servers]:
            started.result()
        yield servers


def engine_arguments(options: Regenerate, index: int, speaker: Speaker) -> dict[str, Any]:
    """SGLang's arguments for engine number `index`; the user's own win."""
    arguments: dict[str, Any] = {
        "model_path": str(speaker.folder),
        "dtype": options.dtype,
        "trust_remote_code": options.trust_remote_code,
        "tp_size": options.tensor_parallel,
        "skip_tokenizer_init": True,
        "context_length": speaker.max_tokens,
        "max_running_requests": options.batch_size,
        "random_seed": options.seed + index,
    }
    return arguments | options.sglang


def device_environment(options: Regenerate, index: int) -> dict[str, str]:
    """What gives engine number `index` GPUs of its own; nothing on a machine without.

    Raises:
        UserError: there are too few.
    """
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

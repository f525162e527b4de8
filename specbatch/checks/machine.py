"""This machine, for a run without a cluster: it has the GPUs and the memory that the run needs."""

from __future__ import annotations

import glob
import os

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.gpus import listed_gpus
from specbatch.units import bytes_text


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs of this machine that a process started here may use."""
    names = listed_gpus()
    return len(glob.glob("/dev/nvidia[0-9]*")) if names is None else len(names)


def check_gpus(config: Config) -> None:
    """Check that this machine has as many GPUs as the run needs, if it has any.

    Raises:
        UserError: it has fewer.
    """
    there = visible_gpus()
    engines, degree = config.inference.engines, config.inference.tensor_parallel
    ranks = config.training.ranks if config.run.goal == "draft" else 0
    needed = ranks + engines * degree
    if there and needed > there and not ranks:
        raise UserError(
            f"inference.engines: {engines} of inference.tensor_parallel: {degree} need {needed} GPUs, but this machine "
            f"has {there}; set inference.engines: {max(1, there // degree)}"
        )
    if there and needed > there:
        raise UserError(
            f"training.ranks: {ranks} and inference.engines: {engines} of inference.tensor_parallel: {degree} need "
            f"{needed} GPUs, but this machine has {there}" + _advice(there, degree)
        )


def _advice(there: int, degree: int) -> str:
    ranks = there - degree
    if ranks >= 1:
        return f"; try training.ranks: {ranks} and inference.engines: 1"
    return "; use a machine with more, or hide its GPUs with CUDA_VISIBLE_DEVICES='' to run on its CPUs"


def warn_of_memory(config: Config) -> list[str]:
    """Warn if the store is larger than this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if config.training.ranks * config.store.bytes_per_rank <= memory:
        return []
    return [
        f"store.bytes_per_rank: {config.store.bytes_per_rank} of training.ranks: {config.training.ranks} are more than "
        f"this machine's memory of {bytes_text(memory)}"
    ]

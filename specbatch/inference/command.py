"""The command line of an SGLang server, and the cores of its ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def parts_arguments(nodes: int, rank: int, address: str) -> dict[str, Any]:
    """Return SGLang's arguments for a part of a server on one of several nodes."""
    return {"nnodes": nodes, "node_rank": rank, "dist_init_addr": address}


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Format arguments for SGLang's command line; values keep every byte.

    Raises:
        ValueError: a list is empty, which SGLang's command line can't express.
    """
    words: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            if not value:
                raise ValueError(f"{name}: an empty list")
            words += [flag, *map(str, value)]
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            # Joined by "=", so that a value which begins with a dash is not taken for an option.
            words.append(f"{flag}={text}")
    return words


def bind_cores(cores: list[int], ranks: int, threads: int | None) -> str:
    """The cores of each CPU rank, in the format of ``SGLANG_CPU_OMP_THREADS_BIND``: ``0-1|2-3``.

    Args:
        cores: those that this process may use, ascending.
        threads: cores a rank; an even share if None. Ranks share cores where there are too few.
    """
    share = threads or max(1, len(cores) // ranks)
    chosen = [[cores[(rank * share + i) % len(cores)] for i in range(min(share, len(cores)))] for rank in range(ranks)]
    return "|".join(",".join(map(str, sorted(rank))) for rank in chosen)

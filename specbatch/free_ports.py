"""Ports to listen on: any free port, or one of a range that a site has opened."""

from __future__ import annotations

import os
import random
import re
import socket
from contextlib import ExitStack

from specbatch.errors import RunError, UserError

SMALLEST_RANGE = 100
"""Ports that a node with several engines and ranks may need, with a reserve for ports in use."""
_range: tuple[int, int] | None = None


def port_range(text: str) -> tuple[int, int] | None:
    """Parse a text such as ``20000-20999`` into first and last port; None for empty text.

    Raises:
        UserError: it is not a range, or too small.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    low, high = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (low >= 1024 and high < 65536 and high - low + 1 >= SMALLEST_RANGE):
        raise UserError(
            f"slurm.ports: {text} is not a range of {SMALLEST_RANGE} ports or more; write it as 20000-20999, from 1024 "
            "to 65535"
        )
    return low, high


def use_ports(text: str) -> None:
    """Restrict this process, its children, and libraries that have such a setting to ports of a range.

    Raises:
        UserError: the same as `port_range`.
    """
    global _range
    _range = port_range(text)
    if _range is not None:
        # Mooncake's clients use them both as ports to listen on and as mere identifiers.
        for name in ("MC_MIN_RPC_PORT", "MC_MIN_PRC_PORT", "MC_STORE_CLIENT_MIN_PORT"):
            os.environ.setdefault(name, str(_range[0]))
        for name in ("MC_MAX_RPC_PORT", "MC_MAX_PRC_PORT", "MC_STORE_CLIENT_MAX_PORT"):
            os.environ.setdefault(name, str(_range[1]))


def restricted() -> bool:
    """Return whether ports are restricted to a range."""
    return _range is not None


def free_ports(address: str, count: int) -> list[int]:
    """Return TCP ports on which nothing listens now; another process may take one before the caller does.

    Raises:
        RunError: the address is not this machine's, or has no free port.
    """
    with ExitStack() as stack:
        try:
            sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]
            for each in sockets:
                _bind(each, address)
        except OSError as error:
            raise RunError(f"no port is free on {address}, or it is not an address of this machine: {error}") from error
        return [int(each.getsockname()[1]) for each in sockets]


def _bind(one: socket.socket, address: str) -> None:
    if _range is None:
        one.bind((address, 0))
        return
    # In random order, so that several processes of a node rarely try the same one.
    problem = OSError(f"all ports from {_range[0]} to {_range[1]} are taken")
    for port in random.sample(range(_range[0], _range[1] + 1), _range[1] - _range[0] + 1):
        try:
            one.bind((address, port))
        except OSError as error:
            problem = error
        else:
            return
    raise problem

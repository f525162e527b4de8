"""A process that lends the store memory until its standard input ends: `python -m tests.transfer.owner PORT BYTES`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from specbatch.config import Store
from specbatch.transfer.store import StoreClient


@dataclass(frozen=True)
class Address:
    """Address of a master."""

    master_port: int
    host: str = "127.0.0.1"


@dataclass
class Owner:
    """The process and its segment."""

    process: subprocess.Popen
    segment: str


@contextmanager
def owner(port: int, nbytes: int, **environment: str) -> Iterator[Owner]:
    """Start one and end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.transfer.owner", str(port), str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **environment},
    )
    try:
        segment = process.stdout.readline().strip()
        assert segment, "the owner did not start"
        yield Owner(process, segment)
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    client = StoreClient(Address(int(sys.argv[1])), Store(), segment_bytes=int(sys.argv[2]))
    print(client.segment, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

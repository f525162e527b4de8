"""What processes listen on, in whatever network namespace they are, from ``/proc``."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

LISTENS = "0A"


def listening(pid: int) -> Iterator[tuple[str, int]]:
    """Yield address and port of each TCP socket on which a process listens."""
    mine = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            mine.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == LISTENS and fields[9] in mine:
                yield _address(address), int(port, 16)


def _address(text: str) -> str:
    """Return an address from groups of four bytes in this machine's order."""
    groups = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8)]
    found = ipaddress.ip_address(b"".join(groups))
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)

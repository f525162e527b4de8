"""A wall clock that jumps for the processes of one run only (``clock.c``)."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """Compiles the library once.

    Args:
        folder: for the library and the file with the seconds.
    """

    def __init__(self, folder: Path) -> None:
        self._library, self._jump = folder / "clock.so", folder / "jump"
        self.set(0)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", self._library, SOURCE, "-ldl"], check=True)

    def environment(self) -> dict[str, str]:
        """Environment for the processes that use this clock."""
        return {"LD_PRELOAD": str(self._library), "SPECBATCH_CLOCK": str(self._jump)}

    def set(self, seconds: int) -> None:
        """Have the clock go wrong by so much from now on."""
        if not self._jump.exists():
            self._jump.write_bytes(struct.pack("q", 0))
        with self._jump.open("r+b", buffering=0) as file:
            file.write(struct.pack("q", seconds))

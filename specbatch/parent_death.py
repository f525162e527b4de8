"""Processes that do not outlive their parent: Linux kills them when it dies, for whatever reason.

The kernel binds this to the thread that started the process, so that thread has to live as long as the process is
needed. ``python parent_death.py PARENT COMMAND...`` becomes the command, for parents with several threads: nothing may
run between their fork and exec.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies; end it at once if the parent is dead already.

    Args:
        parent: the parent's process id; the current parent by default.
    """
    expected = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected:
        os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])

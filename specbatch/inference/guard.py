"""Run a command in a session of its own, and leave nothing of it behind.

``python -m specbatch.inference.guard OWNER GRACE_S COMMAND...`` ends the command and everything that it started when
its own standard input closes, when the process OWNER is no longer its parent, or when the command ends by itself;
then it removes the folder that the command had for temporary files. If it is killed itself, so is the command.
The owner keeps the other end of the pipe, so its death, however sudden, closes it. It is a process of its own because
the kernel's parent-death signal is bound to the thread that started a child, and engines are restarted from threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

POLL_S = 0.25
PR_SET_PDEATHSIG = 1


def main(owner: int, grace_s: float, command: list[str]) -> int:
    """Run the command until it ends or its owner lets go.

    Args:
        owner: process id of the parent.
        grace_s: seconds between asking the command to end and killing its whole process group.

    Returns:
        The command's return code, as `subprocess` gives it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # A handler, because what is ignored stays ignored in the command.
        signal.signal(number, lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="specbatch-") as folder:
        # The command's sockets and the like; compiled kernels stay where they are found again.
        kernels = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(kernels)} | dict(os.environ) | {"TMPDIR": folder}
        return _watch(owner, grace_s, command, environment)


def _watch(owner: int, grace_s: float, command: list[str], environment: dict[str, str]) -> int:
    # Safe between fork and exec: there is one thread, and it lives as long as the process.
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True, preexec_fn=_die_with_parent
    )
    try:
        while child.poll() is None and os.getppid() == owner:
            if select.select([sys.stdin.fileno()], [], [], POLL_S)[0]:
                break
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(grace_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def _die_with_parent() -> None:
    """Have the kernel kill this process with its parent: the guard itself may be killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    code = main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    sys.exit(code if code >= 0 else 128 - code)

"""Runs a command in a separate session, and leaves nothing of it behind.

``python -m specbatch.inference.guard OWNER GRACE_S COMMAND...`` ends the command and everything that it started when
its own standard input closes, when the process OWNER is no longer its parent, or when the command ends by itself; then
it removes the folder that the command had for temporary files. If it is killed itself, so is the command. The owner
keeps the other end of the pipe, so its death, however sudden, closes it. It is a separate process because the kernel's
parent-death signal is bound to the thread that started a child, and engines are restarted from threads.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from specbatch.parent_death import die_with_parent

POLL_S = 0.25
SHARED_S = 15.0
"""Interval at which the command's shared memory is recorded, since that is impossible after its end."""


def main(owner: int, grace_s: float, command: list[str]) -> int:
    """Run the command until it ends or its owner is gone.

    Args:
        owner: process id of the parent.
        grace_s: seconds between asking the command to end and killing its whole process group.

    Returns:
        The command's return code, as `subprocess` gives it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # A handler, because an ignored signal would stay ignored in the command.
        signal.signal(number, lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="specbatch-") as folder:
        # Holds the command's sockets and the like; compiled kernels stay where later starts find them.
        kernels = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(kernels)} | dict(os.environ) | {"TMPDIR": folder}
        return _watch(owner, grace_s, command, environment)


def _watch(owner: int, grace_s: float, command: list[str], environment: dict[str, str]) -> int:
    # The guard itself may be killed. Safe between fork and exec: there is one thread, and it lives as long as the
    # process.
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True, preexec_fn=die_with_parent
    )
    shared: set[Path] = set()
    looked = time.monotonic()
    try:
        while child.poll() is None and os.getppid() == owner:
            if select.select([sys.stdin.fileno()], [], [], POLL_S)[0]:
                break
            if time.monotonic() - looked > SHARED_S:
                shared, looked = shared_memory_of(child.pid), time.monotonic()
        shared |= shared_memory_of(child.pid)
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(grace_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    for path in shared:
        # Semaphores and the like, which killed processes leave in the node's memory.
        with contextlib.suppress(OSError):
            path.unlink()
    return code


def shared_memory_of(session: int) -> set[Path]:
    """Return the files in /dev/shm that are mapped only by processes of a session.

    They are identified by inode, since a semaphore is mapped under a temporary name.
    """
    ours: set[int] = set()
    others: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            of = ours if os.getsid(int(process.name)) == session else others
            maps = (process / "maps").read_text()
        except OSError:
            continue
        of.update(int(line.split(maxsplit=5)[4]) for line in maps.splitlines() if " /dev/shm/" in line)
    wanted, found = ours - others, set()
    for entry in os.scandir("/dev/shm"):
        with contextlib.suppress(OSError):
            if entry.inode() in wanted:
                found.add(Path(entry.path))
    return found


if __name__ == "__main__":
    code = main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    sys.exit(code if code >= 0 else 128 - code)

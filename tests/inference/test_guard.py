"""The command of a guard ends with its owner, however the owner ends."""

from __future__ import annotations

import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.light
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(f"{child.pid}")
time.sleep(600)
"""
"""Does not end when asked to, and has a child."""
OWNER = """
import os, subprocess, sys, time
guard = [sys.executable, "-m", "specbatch.inference.guard", str(os.getpid()), "0.2", *sys.argv[1:]]
subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""


def tree(root: int, note: Path) -> list[psutil.Process]:
    """The processes below ``root``, once the innermost one has been started."""
    until = time.monotonic() + 30
    while not (note.exists() and note.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    return psutil.Process(root).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_all_ends_when_the_owner_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "child"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, sys.executable, "-c", STUBBORN, str(note)])
    below = tree(owner.pid, note)
    assert len(below) == 3
    owner.kill()
    owner.wait()
    assert gone(below)


def test_the_command_ends_when_the_guard_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "child"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, sys.executable, "-c", STUBBORN, str(note)])
    guard, command, child = tree(owner.pid, note)
    guard.kill()
    assert gone([command])
    child.kill()
    owner.kill()
    owner.wait()


def test_all_ends_when_the_owner_lets_go(tmp_path: Path) -> None:
    note = tmp_path / "child"
    command = [sys.executable, "-c", STUBBORN, str(note)]
    guard = [sys.executable, "-m", "specbatch.inference.guard", str(psutil.Process().pid), "0.2", *command]
    with subprocess.Popen(guard, stdin=subprocess.PIPE) as process:
        below = tree(process.pid, note)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) != 0
    assert gone(below)


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 128 + 9)])
def test_the_guard_ends_as_its_command_did_and_removes_its_folder(tmp_path: Path, ends: str, code: int) -> None:
    note = tmp_path / "folder"
    script = f"import os, sys; open(sys.argv[1], 'w').write(os.environ['TMPDIR']); {ends}"
    guard = [sys.executable, "-m", "specbatch.inference.guard", str(psutil.Process().pid), "0.2"]
    with subprocess.Popen([*guard, sys.executable, "-c", script, str(note)], stdin=subprocess.PIPE) as process:
        assert process.wait(20) == code
    assert not Path(note.read_text()).exists()


SHARING = """
import multiprocessing, multiprocessing.shared_memory, sys, time
lock = multiprocessing.get_context("spawn").Lock()
block = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
theirs = open("/dev/shm/" + sys.argv[2], "r+b")
import mmap; seen = mmap.mmap(theirs.fileno(), 0)
open(sys.argv[1], "w").write(f"{lock._semlock.name} {block.name}")
time.sleep(600)
"""


def test_shared_memory_of_a_killed_command_is_removed_and_that_of_others_is_not(tmp_path: Path) -> None:
    note, mine = tmp_path / "names", SharedMemory(create=True, size=4096)
    try:
        command = [sys.executable, "-c", SHARING, str(note), mine.name]
        guard = [sys.executable, "-m", "specbatch.inference.guard", str(psutil.Process().pid), "0.2", *command]
        with subprocess.Popen(guard, stdin=subprocess.PIPE) as process:
            tree(process.pid, note)
            semaphore, block = (name.lstrip("/") for name in note.read_text().split())
            left = [Path("/dev/shm") / f"sem.{semaphore}", Path("/dev/shm") / block]
            assert all(path.exists() for path in left)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(20)
        assert not any(path.exists() for path in left)
        assert (Path("/dev/shm") / mine.name).exists()
    finally:
        mine.close()
        mine.unlink()

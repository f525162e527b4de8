"""The target once a node: one copy for all of a node's engines, whole or not there, and gone when nobody needs it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from specbatch.errors import AttemptError, EngineIncomplete, RunError, UserError
from specbatch.inference import staging, target_copy
from specbatch.inference.server import EngineError, SGLangServer
from specbatch.inference.staging import removed_afterwards, room, stage, staged, use_stage
from specbatch.mounts import IN_MEMORY, file_system

OWN = f"specbatch-{os.getuid()}"
AN_ENGINE = """
import logging, sys, threading
from specbatch.inference.staging import removed_afterwards, stage, staged, use_stage
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
use_stage(sys.argv[1])
with removed_afterwards(lambda: True):
    assert stage(sys.argv[2], threading.Event())
    print(staged(sys.argv[2]), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory of this node's disk."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        if file_system(Path(name)) in IN_MEMORY:
            pytest.fail("/var/tmp of this machine is in memory")
        yield Path(name)
        staging._let_go(over=True)
        use_stage("")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory of this node's memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)
        staging._let_go(over=True)
        use_stage("")


@pytest.fixture
def target(tmp_path: Path, tiny_target: Path) -> Path:
    """A target with what directories of the hub have besides."""
    folder = tmp_path / "Tiny-2.1"
    shutil.copytree(tiny_target, folder)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"0" * 1000)
    return folder


def engine(base: Path, target: Path) -> subprocess.Popen[str]:
    """Another process of this node that reads the target, until its input is closed."""
    argv = [sys.executable, "-c", AN_ENGINE, str(base), str(target)]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def copies(base: Path) -> list[Path]:
    """Whole copies, and what is left of others."""
    return [path for path in sorted(base.glob(f"{OWN}/*")) if path.is_dir()]


def use(base: Path, target: Path) -> Path:
    """Copy the target as an engine of this process does. Returns the directory that it reads."""
    use_stage(str(base))
    assert stage(target, threading.Event())
    return Path(staged(target))


def test_a_copy_has_all_that_the_target_has_and_nobody_else_can_read_it(disk: Path, target: Path):
    with removed_afterwards(lambda: False):
        copy = use(disk, target)
        assert copy.name == target.name, "SGLang guesses by the name what a model is"
        assert {path.name for path in copy.iterdir()} == {path.name for path in target.iterdir()}
        for path in target.iterdir():
            assert path.is_dir() or (copy / path.name).read_bytes() == path.read_bytes()
        assert not (copy / "model.safetensors").is_symlink()
        assert (copy / "original").readlink() == target / "original"
        assert (disk / OWN).stat().st_mode & 0o777 == 0o700
        assert room(str(disk), target) == f"a whole copy in {disk / OWN}"
    assert staged(target) == target
    assert len(copies(disk)) == 1, "on a disk it stays for the next attempt"
    with removed_afterwards(lambda: True):
        before = copy.stat().st_ino
        assert use(disk, target).stat().st_ino == before, "it is used again"
    assert list(disk.iterdir()) == [], "the run is over"


def test_engines_of_a_node_share_one_copy_that_the_last_one_removes_from_memory(memory: Path, target: Path):
    engines = [engine(memory, target) for _ in range(3)]
    said = []
    for each in engines:
        assert each.stdout is not None
        lines = [next(each.stdout).strip()]
        while not lines[-1].startswith(str(memory)):
            lines.append(next(each.stdout).strip())
        said.append(lines)
    assert {lines[-1] for lines in said} == {str(copies(memory)[0] / target.name)}
    assert sorted(len(lines) for lines in said) == [1, 1, 3], "one of them copied"
    engines[0].communicate()
    assert len(copies(memory)) == 1
    engines[1].kill()
    engines[1].wait()
    engines[2].communicate()
    assert list(memory.iterdir()) == []


def test_what_was_cut_off_is_never_taken_for_a_copy(disk: Path, target: Path):
    with removed_afterwards(lambda: False):
        copy = use(disk, target)
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    shutil.copytree(copy.parent, copy.parent.with_suffix(".part"))
    assert "room for" in room(str(disk), target)
    with removed_afterwards(lambda: False):
        assert (use(disk, target) / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()
    assert copies(disk) == [copy.parent]
    # A process that is killed while it copies leaves no copy, and no lock.
    shutil.rmtree(disk / OWN)
    slow = AN_ENGINE.replace("use_stage(", "import time, os; os.fsync = lambda fd: time.sleep(60); use_stage(", 1)
    argv = [sys.executable, "-c", slow, str(disk), str(target)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not list(disk.glob(f"{OWN}/*.part/*/model.safetensors")) and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
    assert [path.suffix for path in copies(disk)] == [".part"]
    with removed_afterwards(lambda: False):
        use(disk, target)
    assert [path.suffix for path in copies(disk)] == [""]


def test_another_state_of_the_target_is_copied_anew_and_the_one_before_is_removed_from_memory(
    memory: Path, target: Path
):
    (memory / OWN).mkdir()
    with removed_afterwards(lambda: False):
        before = use(memory, target)
        left = shutil.copytree(before.parent, memory / OWN / "0123", symlinks=True)
        (memory / OWN / "0123.lock").touch()
    assert copies(memory) == [left], "as of an engine that was killed"
    (target / "config.json").write_text((target / "config.json").read_text() + " ")
    with removed_afterwards(lambda: False):
        copy = use(memory, target)
        assert copy.parent.name != before.parent.name
        assert (copy / "config.json").read_bytes() == (target / "config.json").read_bytes()
        assert copies(memory) == [copy.parent]


def test_an_engine_that_comes_back_at_once_keeps_its_copy_and_one_that_failed_does_not(memory: Path, target: Path):
    def fails(error: Exception) -> None:
        with removed_afterwards(nobody_answers):
            use(memory, target)
            raise error

    def nobody_answers() -> bool:
        raise RunError("the dispatcher is gone")

    with pytest.raises(EngineIncomplete):
        fails(EngineIncomplete("a node is lost"))
    assert len(copies(memory)) == 1
    staging._let_go(over=True)

    with pytest.raises(UserError):
        fails(UserError("no GPU"))
    assert list(memory.iterdir()) == []
    with removed_afterwards(nobody_answers):
        use(memory, target)
    assert list(memory.iterdir()) == []


def test_a_directory_that_is_not_ours_or_has_no_room_ends_it_in_one_line(
    disk: Path, target: Path, monkeypatch: pytest.MonkeyPatch
):
    def why() -> str:
        told = []
        for check in (lambda: room(str(disk), target), lambda: use(disk, target)):
            with pytest.raises(UserError) as error:
                check()
            told.append(str(error.value))
        assert told[0] == told[1]
        assert "\n" not in told[0]
        return told[0]

    with monkeypatch.context() as patch:
        patch.setattr(staging, "SPARE_BYTES", 1 << 60)
        assert f"and a copy of {target} needs 1048576.00 TiB; name another directory of the nodes" in why()
        # What nobody uses makes room first.
        (disk / OWN / "0123").mkdir(parents=True)
        (disk / OWN / "0123.lock").touch()
        why()
        assert copies(disk) == []
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        (disk / "specbatch-12345").mkdir()
        assert "specbatch-12345 on" in why()
        assert f"no directory of yours but uid {os.geteuid()}'s" in why()
    (disk / OWN).symlink_to(target)
    assert "no directory of yours" in why()
    (disk / OWN).unlink()
    disk.chmod(0o777)
    assert "lets every user replace what others have there" in why()
    disk.chmod(0o1777)
    assert "room for" in room(str(disk), target)
    with pytest.raises(UserError, match=r"/nowhere can't be used on .*: No such file or directory; name another"):
        room("/nowhere", target)
    with pytest.raises(UserError, match=r"^slurm.stage_target: \$NOT_SET is \$NOT_SET on .*, which is no directory"):
        use_stage("$NOT_SET")
    monkeypatch.setenv("SCRATCH_HERE", str(disk))
    assert room("$SCRATCH_HERE", target).endswith(f"in {disk}")


def test_a_disk_that_fills_while_it_is_copied_to_leaves_nothing_and_says_so(
    disk: Path, target: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(target_copy.os, "fsync", lambda fd: full(errno.ENOSPC))
    with pytest.raises(UserError, match="ran out of room in"):
        use(disk, target)
    assert copies(disk) == []
    monkeypatch.setattr(target_copy.os, "fsync", lambda fd: full(errno.EIO))
    with pytest.raises(AttemptError, match=r"can't be copied to .*Input/output error"):
        use(disk, target)
    assert copies(disk) == []


def test_an_engine_that_is_asked_to_end_copies_no_further(disk: Path, target: Path, tmp_path: Path):
    use_stage(str(disk))
    server = SGLangServer({"model_path": target}, tmp_path / "engine.log")
    server.stop()
    with pytest.raises(EngineError, match="asked to end"):
        server.start()
    ended = threading.Event()
    source = target_copy.CopiedTarget(target)
    ended.set()
    with pytest.raises(target_copy.Ended):
        source.copy_to(disk / "copy", ended)
    with pytest.raises(target_copy.Ended):
        staging._make(disk, source, disk / "copy", ended)
    assert list(disk.iterdir()) == []


def test_no_engine_begins_a_copy_while_one_is_removed(memory: Path, target: Path, monkeypatch: pytest.MonkeyPatch):
    remove, begun = shutil.rmtree, []

    def begin_before(path: Path, **how: bool) -> None:
        begun.append(staging._hold(memory, staging.CopiedTarget(target), threading.Event()))
        remove(path, **how)

    with removed_afterwards(lambda: True):
        use(memory, target)
        monkeypatch.setattr(staging.shutil, "rmtree", begin_before)
    assert len(begun) == 2
    assert begun == [None, None]
    assert list(memory.iterdir()) == []

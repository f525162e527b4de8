"""Everything that is done to a run on purpose, each kind as a function of what there is to be hit and of chance."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from specbatch.snapshot.manifest import snapshot_path, whole_snapshots
from tests.faults.objects import Stranger
from tests.faults.processes import GONE
from tests.faults.scene import Scene, Sign

TRAINED: Sign = ("training", " trained step=")
RANKS_BACK: tuple[Sign, ...] = (("training", " joined rank=0 "), TRAINED)
ENGINE_BACK: tuple[Sign, ...] = (("inference", " engine ready "), ("inference", " stored pack="), TRAINED)
ATTEMPT_BACK: tuple[Sign, ...] = (("training", " joined rank=0 "), ("inference", " stored pack="), TRAINED)
PIDFD_GETFD = 438
SHORT_S = (0.1, 1.0)
LONG_S = (8.0, 15.0)
"""An engine loses its claims after 4 s, a rank its memory after 10, a head its engines after 30."""
FULL_BYTES = 330 << 10
"""A file of a full disk grows no longer than this; snapshots of the tiny draft are longer, its metrics are not."""
LONGEST_LOG = 280 << 10
"""Size of the log of a rank whose disk is full, so that it can still report that."""

Inject = Callable[[Scene, random.Random], bool]


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    inject: Inject
    """Does it; False if there was nothing to be hit."""
    back: Sequence[Sign] = field(default=(TRAINED,))
    """Lines that the logs must show before the run counts as recovered."""
    weight: int = 1
    """Relative frequency of the kind."""
    stage: str = "training"
    """The stage of the run in which it makes sense."""


def kill(target: str, *, all_of_them: bool = False) -> Inject:
    """SIGKILL."""

    def inject(scene: Scene, draw: random.Random) -> bool:
        found = scene.processes.find(target)
        chosen = found if all_of_them else found[:1] and [draw.choice(found)]
        return sum(_send(process, signal.SIGKILL) for process in chosen) > 0

    return inject


def stop(target: str, shortest_s: float, longest_s: float) -> Inject:
    """SIGSTOP, and SIGCONT a while later."""

    def inject(scene: Scene, draw: random.Random) -> bool:
        found = scene.processes.find(target)
        if not found or not _send(process := draw.choice(found), signal.SIGSTOP):
            return False
        time.sleep(draw.uniform(shortest_s, longest_s))
        _send(process, signal.SIGCONT)
        return True

    return inject


def drain(target: str, number: signal.Signals) -> Inject:
    """Signals that Slurm sends before it kills."""

    def inject(scene: Scene, draw: random.Random) -> bool:
        found = scene.processes.find(target)
        return bool(found) and _send(draw.choice(found), number)

    return inject


def kill_command(scene: Scene, draw: random.Random) -> bool:
    """``specbatch run`` itself."""
    assert scene.command is not None
    scene.command.kill()
    scene.command.wait()
    return True


def cut(target: str) -> Inject:
    """Shut TCP connections of a process down, as a network that loses them would."""

    def inject(scene: Scene, draw: random.Random) -> bool:
        found = scene.processes.find(target)
        if not found:
            return False
        process = draw.choice(found)
        try:
            connections = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
        except GONE:
            return False
        chosen = [connection for connection in connections if draw.random() < 0.5] or connections[:1]
        return sum(_shut(process.pid, connection.fd) for connection in chosen) > 0

    return inject


def fill_disk(scene: Scene, draw: random.Random) -> bool:
    """No file of a rank may grow until a snapshot has failed. The kernel says "too large" in place of "no space"."""
    logs = (scene.run_dir.attempt(scene.processes.attempt()) / "logs").glob("training-*.log")
    if max(file.stat().st_size for file in [*logs, scene.run_dir.metrics]) > LONGEST_LOG:
        return False
    limits: dict[psutil.Process, tuple[int, int]] = {}

    def limit() -> None:
        """Ranks that are started meanwhile find the same disk."""
        for rank in scene.processes.find("rank"):
            with contextlib.suppress(*GONE):
                if rank not in limits:
                    limits[rank] = rank.rlimit(psutil.RLIMIT_FSIZE)
                    rank.rlimit(psutil.RLIMIT_FSIZE, (FULL_BYTES, limits[rank][1]))

    after = scene.marks()
    limit()
    if limits:
        scene.await_signs([("training", "SNAPSHOT FAILED")], after, limit)
    for rank, before in limits.items():
        with contextlib.suppress(*GONE):
            rank.rlimit(psutil.RLIMIT_FSIZE, before)
    return bool(limits)


def damage_snapshot(spoil: Callable[[Path, random.Random], None]) -> Inject:
    """Kill the ranks, and spoil the newest snapshot, which the next ones look at."""

    def inject(scene: Scene, draw: random.Random) -> bool:
        folder, ranks = scene.run_dir.snapshots, scene.processes.find("rank")
        if len(whole_snapshots(folder)) < 2 or not sum(_send(rank, signal.SIGKILL) for rank in ranks):
            return False
        # Only now: a snapshot that was finished between would be a second way back, or leave two spoiled ones.
        newest = whole_snapshots(folder)[-1]
        spoil(draw.choice(sorted(snapshot_path(folder, newest).iterdir())), draw)
        return True

    return inject


def flip_byte(file: Path, draw: random.Random) -> None:
    """Flip one bit of a file."""
    with file.open("r+b") as opened:
        opened.seek(draw.randrange(file.stat().st_size))
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1 << draw.randrange(8)]))


def truncate(file: Path, draw: random.Random) -> None:
    """Truncate a file to a random length."""
    os.truncate(file, draw.randrange(file.stat().st_size))


def meddle(how: Callable[[Stranger, list[str]], int]) -> Inject:
    """Change some objects in the store, as a client that does not belong to the run."""

    def inject(scene: Scene, draw: random.Random) -> bool:
        try:
            stranger = scene.stranger()
            keys = stranger.keys()
        except (OSError, http.client.HTTPException):
            return False
        return bool(keys) and how(stranger, draw.sample(keys, max(1, len(keys) // 2))) > 0

    return inject


def jump_clock(scene: Scene, draw: random.Random) -> bool:
    """The wall clock of all processes, by up to a day in either direction."""
    if scene.clock is None:
        return False
    scene.clock.set(draw.randint(-86400, 86400))
    return True


KINDS = (
    Kind("kill head", kill("head"), ATTEMPT_BACK),
    Kind("kill master", kill("master"), ATTEMPT_BACK),
    Kind("kill engine", kill("engine"), ENGINE_BACK),
    Kind("kill engine's guard", kill("guard"), ENGINE_BACK),
    Kind("kill SGLang's server", kill("server"), ENGINE_BACK),
    Kind("kill SGLang's scheduler", kill("scheduler"), ENGINE_BACK),
    Kind("kill agent", kill("agent"), RANKS_BACK, weight=2),
    Kind("kill rank", kill("rank"), RANKS_BACK, weight=6),
    Kind("kill all ranks", kill("rank", all_of_them=True), RANKS_BACK, weight=2),
    Kind("kill head's controller", kill("head's controller"), ATTEMPT_BACK),
    Kind("kill engine's controller", kill("engine's controller"), ENGINE_BACK),
    Kind("kill agent's controller", kill("agent's controller"), RANKS_BACK),
    Kind("kill command", kill_command, ATTEMPT_BACK),
    Kind("kill evaluator", kill("engine"), (), weight=0, stage="evaluating"),
    Kind("stop head, short", stop("head", *SHORT_S), weight=5),
    Kind("stop head, long", stop("head", *LONG_S)),
    Kind("stop master, short", stop("master", *SHORT_S), weight=5),
    Kind("stop engine, short", stop("engine", *SHORT_S), weight=5),
    Kind("stop master, long", stop("master", *LONG_S)),
    Kind("stop engine, long", stop("engine", *LONG_S)),
    Kind("stop scheduler, short", stop("scheduler", *SHORT_S), weight=5),
    Kind("stop scheduler, long", stop("scheduler", *LONG_S)),
    Kind("stop rank, short", stop("rank", *SHORT_S), weight=5),
    Kind("stop rank, long", stop("rank", *LONG_S)),
    Kind("stop agent, short", stop("agent", *SHORT_S), weight=5),
    Kind("TERM to rank", drain("rank", signal.SIGTERM), ATTEMPT_BACK),
    Kind("TERM to agent", drain("agent", signal.SIGTERM), ATTEMPT_BACK),
    Kind("USR2 to engine", drain("engine", signal.SIGUSR2), ATTEMPT_BACK),
    Kind("USR2 to head", drain("head", signal.SIGUSR2), ATTEMPT_BACK),
    Kind("cut head's connections", cut("head"), weight=8),
    Kind("cut engine's connections", cut("engine"), weight=2),
    Kind("cut scheduler's connections", cut("scheduler"), weight=8),
    Kind("cut rank's connections", cut("rank"), weight=4),
    Kind("cut master's connections", cut("master"), weight=8),
    Kind("full disk", fill_disk, weight=4),
    Kind("flip a snapshot's byte", damage_snapshot(flip_byte), RANKS_BACK, weight=2),
    Kind("truncate a snapshot", damage_snapshot(truncate), RANKS_BACK, weight=2),
    Kind("remove objects", meddle(Stranger.remove), weight=30),
    Kind("overwrite objects", meddle(Stranger.overwrite), weight=30),
    Kind("clock jumps", jump_clock, weight=15),
)


def _send(process: psutil.Process, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)
    except GONE:
        return False
    return True


def _shut(pid: int, fd: int) -> bool:
    """Shut a socket of another process down, by a copy of its descriptor (pidfd_getfd, Linux 5.6)."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    copy = libc.syscall(PIDFD_GETFD, pidfd, fd, 0)
    os.close(pidfd)
    if copy < 0:
        return False
    with socket.socket(fileno=copy) as connection:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
    return True

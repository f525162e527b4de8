"""Faults really happen, and count only if they did: on processes that look like a run's, and do nothing."""

from __future__ import annotations

import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import submitit

from specbatch.rundir import RunDir
from tests.faults.kinds import FULL_BYTES, cut, fill_disk, kill
from tests.faults.processes import Processes
from tests.faults.table import summed
from tests.faults.tally import KEPT, Tally, write

CONNECTS = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[2]))); sys.stdin.read()"
RESTARTS = """
import subprocess, sys
while True:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)", "specbatch.training.process.rank"])
"""
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.attempt(1).mkdir(parents=True)
    made.metrics.touch()
    return made


@pytest.fixture
def scene(run_dir: RunDir) -> SimpleNamespace:
    """The part of a scene that a fault uses."""
    return SimpleNamespace(run_dir=run_dir, processes=Processes(run_dir), marks=dict)


@pytest.fixture
def start(run_dir: RunDir) -> Iterator[Start]:
    """Start a script in the place of a component."""
    started: list[subprocess.Popen[bytes]] = []

    def make(component: str, script: str, *words: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", script, str(run_dir.root), *map(str, words)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        started.append(process)
        log = run_dir.component_log(1, component, 0)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"started pid={process.pid} attempt=1\n")
        return process

    yield make
    for process in started:
        with process:
            for child in psutil.Process(process.pid).children() if process.poll() is None else []:
                child.kill()
            process.kill()


def test_connections_are_cut_and_nothing_is_counted_where_there_is_none(scene: SimpleNamespace, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        start("inference", CONNECTS, listener.getsockname()[1])
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(20)
        assert cut("engine")(scene, random.Random(0))
        assert connection.recv(1) == b""
    assert not cut("engine")(scene, random.Random(0))
    assert not cut("head")(scene, random.Random(0))


def test_a_process_is_killed_and_nothing_is_counted_where_there_is_none(scene: SimpleNamespace, start: Start) -> None:
    process = start("inference", "import sys; sys.stdin.read()")
    assert kill("engine")(scene, random.Random(0))
    assert process.wait(20) == -9
    assert not kill("engine")(scene, random.Random(0))


def test_what_submitit_puts_above_a_component_is_found(scene: SimpleNamespace, run_dir: RunDir) -> None:
    before = set(psutil.Process().children())
    job = submitit.LocalExecutor(folder=run_dir.attempt(1) / "submitit").submit(time.sleep, 600)
    try:
        (controller,) = set(psutil.Process().children()) - before
        until = time.monotonic() + 20
        while not (below := controller.children()):
            assert time.monotonic() < until
            time.sleep(0.01)
        log = run_dir.component_log(1, "training", 0)
        log.parent.mkdir(parents=True)
        log.write_text(f"started pid={below[0].pid} attempt=1\n")
        assert scene.processes.find("agent") == below
        assert scene.processes.find("agent's controller") == [controller]
        assert kill("agent's controller")(scene, random.Random(0))
        assert controller.wait(20) == -9
        below[0].kill()
    finally:
        job.cancel()


def test_a_disk_is_full_for_ranks_that_are_started_meanwhile_too(scene: SimpleNamespace, start: Start) -> None:
    component = start("training", RESTARTS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def rank(*others: psutil.Process) -> psutil.Process:
        until = time.monotonic() + 20
        while True:
            found = [child for child in psutil.Process(component.pid).children() if child not in others]
            if found and "specbatch.training.process.rank" in found[0].cmdline():
                return found[0]
            assert time.monotonic() < until
            time.sleep(0.01)

    seen: list[psutil.Process] = [rank()]

    def await_signs(signs: object, after: object, meanwhile: Callable[[], None]) -> bool:
        assert seen[0].rlimit(psutil.RLIMIT_FSIZE)[0] == FULL_BYTES
        seen[0].kill()
        seen.append(rank(seen[0]))
        assert seen[1].rlimit(psutil.RLIMIT_FSIZE) == before
        meanwhile()
        assert seen[1].rlimit(psutil.RLIMIT_FSIZE)[0] == FULL_BYTES
        return True

    scene.await_signs = await_signs
    assert fill_disk(scene, random.Random(0))
    assert seen[1].rlimit(psutil.RLIMIT_FSIZE) == before


def test_a_disk_is_not_full_where_no_rank_is(scene: SimpleNamespace) -> None:
    assert not fill_disk(scene, random.Random(0))


def test_what_several_campaigns_counted_is_one_table(tmp_path: Path) -> None:
    for number, steps in enumerate([1, 4]):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder / KEPT, 2, {"kill rank": Tally(2, 2, [steps], [10.0 + number]), f"kind {number}": Tally(1, 1)})
    said = summed([tmp_path / "0", tmp_path / "1"])
    assert said.startswith("6 faults in 4 runs.")
    assert "| kill rank | 4 | 4 | 2.5 | 4 | 10.5 | 11.0 |" in said
    assert "| kind 1 | 1 | 1 |" in said

"""The nodes of an engine through a real dispatcher, with processes that only sleep in place of SGLang's."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from specbatch.dispatch import engine_nodes
from specbatch.dispatch.client import Client
from specbatch.errors import EngineIncomplete
from specbatch.inference import nodes
from specbatch.inference.nodes import FurtherNodes
from specbatch.inference.place import EnginePart
from specbatch.inference.server import EngineError
from tests.dispatch.heads import Head, make_head

NAME = "engine-0"


class Sleeper:
    """A process that stays until it is stopped or killed."""

    begun: list[Sleeper] = []  # noqa: RUF012

    def __init__(self, arguments: dict[str, Any], log: Path, *rest: Any, files: dict[str, bytes]) -> None:
        self.arguments, self.files = arguments, files

    def begin(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.begun.append(self)

    def alive(self) -> bool:
        return self.process.poll() is None

    def log_tail(self, lines: int) -> str:
        return "out of memory"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def eventually(holds: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


class Engine:
    """An engine of two nodes; its first one is this test."""

    def __init__(self, head: Head, tmp_path: Path) -> None:
        self._head, self._log = head, tmp_path / "log"
        self.failure: BaseException | None = None
        self.copied: Future[bool] = Future()
        """Whether the target is on the second node."""
        self.copied.set_result(True)
        self._stack = contextlib.ExitStack()
        self.first = FurtherNodes(self._client(), NAME, "127.0.0.1", 2, gather_s=15.0)
        self._second = self._client()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def _client(self) -> Client:
        return self._stack.enter_context(contextlib.closing(Client(self._head.rendezvous)))

    def _follow(self) -> None:
        try:
            nodes._follow(self._second, NAME, EnginePart(2, 1, "127.0.0.1"), self._log, self.copied)
        except BaseException as error:
            self.failure = error

    def launch(self) -> tuple[dict[str, Any], Sleeper]:
        """Launch a server; return the first node's arguments, and what the second node started."""
        before = len(Sleeper.begun)
        mine = self.first.launch({"tp_size": 2, "model_path": Path("m")}, {"A": "b"}, {"F": b"x"}, None)
        eventually(lambda: len(Sleeper.begun) > before)
        return mine, Sleeper.begun[-1]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(nodes, "BEAT_S", 0.05)
    monkeypatch.setattr(nodes, "SGLangServer", Sleeper)
    Sleeper.begun.clear()
    head = make_head()
    with head.server:
        made = Engine(head, tmp_path)
        yield made
        made.close()
    assert not any(sleeper.alive() for sleeper in Sleeper.begun)


def test_a_part_is_started_by_the_first_nodes_word_and_ends_with_its_launch(engine):
    with engine.first as first:
        engine.thread.start()
        mine, part = engine.launch()
        assert (mine["nnodes"], mine["node_rank"]) == (2, 0)
        assert part.arguments == {"tp_size": 2, "model_path": "m", **mine, "node_rank": 1}
        assert part.files == {"F": b"x"}
        first.withdraw()
        eventually(lambda: not part.alive())
        again, other = engine.launch()
        assert other is not part
        assert again["dist_init_addr"] != mine["dist_init_addr"]
        assert first.problem == ""
    engine.thread.join(20)
    assert not engine.thread.is_alive()
    assert engine.failure is None, "the first node left, there is nothing more to do"


def test_a_part_that_ends_is_told_to_the_first_node_and_started_again_by_its_next_launch(engine):
    with engine.first as first:
        engine.thread.start()
        _, part = engine.launch()
        part.process.kill()
        eventually(lambda: first.problem)
        assert "ended: its process ended; its log" in first.problem
        assert first.problem.endswith("out of memory")
        assert not first.gone
        engine.launch()
        assert first.problem == ""
    engine.thread.join(20)
    assert engine.failure is None


def test_a_lost_node_ends_what_is_left_of_its_engine(engine, monkeypatch):
    monkeypatch.setattr(engine_nodes, "SILENT_S", 1.0)
    with engine.first as first:
        engine.thread.start()
        engine.launch()
        engine._second.close()  # it is cut off
        eventually(lambda: first.gone)
        assert "nothing has been heard of its part" in first.problem
    engine.thread.join(20)
    assert not engine.thread.is_alive()


def test_without_its_first_node_a_part_ends(engine, monkeypatch):
    monkeypatch.setattr(engine_nodes, "SILENT_S", 1.0)
    engine.first._tell()  # from an earlier engine: to be ignored
    time.sleep(1.2)
    engine.thread.start()
    time.sleep(0.3)
    assert engine.failure is None
    engine.first._tell()
    engine.thread.join(20)
    assert isinstance(engine.failure, EngineIncomplete)
    assert "its first node was lost" in str(engine.failure)


def test_an_engine_that_is_asked_to_end_waits_for_no_node_any_more(engine):
    with engine.first as first:
        threading.Timer(0.5, first.withdraw).start()
        with pytest.raises(EngineError, match="asked to end"):
            first.launch({}, {}, {}, None)
        first._gather_s = 0.1
        with pytest.raises(EngineError, match="1 of 1 further nodes of the engine did not report within 0 s"):
            first.launch({}, {}, {}, None)
        assert first.gone

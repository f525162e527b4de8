"""An engine that spans several nodes: one SGLang server with a part on each of them.

The first node serves, claims and stores. Before each start of its server it tells the others, through the dispatcher,
what to start and where the ranks meet; they do nothing else. When a part ends, the whole server ends and is restarted.
When a whole node falls silent, the rest of the engine ends without a record, as if it had been killed, so that it is
restarted as a whole.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from specbatch.config import load_config
from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import wait_for
from specbatch.dispatch.messages import Following, Launch, Over
from specbatch.errors import EngineIncomplete, RunError
from specbatch.free_ports import free_ports
from specbatch.inference import staging
from specbatch.inference.command import parts_arguments
from specbatch.inference.place import EnginePart
from specbatch.inference.server import EngineError, SGLangServer
from specbatch.rundir import RunDir
from specbatch.target import locate

logger = logging.getLogger(__name__)

BEAT_S = 1.0
RENDEZVOUS_TIMEOUT_S = 600.0
GATHER_S = 900.0
"""Seconds that nodes may take until all are present, since their setups differ."""


class FurtherNodes:
    """The further nodes of an engine, as seen by its first; a context manager.

    Args:
        engine: name of the engine, the same for all its nodes.
        address: address of this node.
        count: number of nodes, including this one.
        gather_s: see `GATHER_S`.
    """

    def __init__(self, client: Client, engine: str, address: str, count: int, gather_s: float = GATHER_S) -> None:
        self._client, self._engine, self._address, self._count = client, engine, address, count
        self._gather_s, self._start = gather_s, secrets.token_hex(4)
        self._launch: Launch | None = None
        self._hosts: tuple[str, ...] = ()
        self._problem = ""
        self._gone = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        """Guards the attributes above. It is held while a message is sent, so that the dispatcher gets them in
        order."""
        self._withdrawn, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="nodes", daemon=True)

    def __enter__(self) -> FurtherNodes:
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(RunError):
            self._client.lead(
                self._engine, self._start, self._count, None, Over.INCOMPLETE if self._gone else Over.LEFT
            )

    @property
    def count(self) -> int:
        """Return the number of the engine's nodes, including this one."""
        return self._count

    @property
    def problem(self) -> str:
        """Return why the launched server can't continue; empty if it can."""
        return str(self._failure) if self._failure is not None else self._problem

    @property
    def gone(self) -> bool:
        """Return whether a node is lost, so that no launch would help."""
        return self._gone

    def launch(
        self,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        files: Mapping[str, bytes],
        threads: int | None,
    ) -> dict[str, Any]:
        """Make the other nodes start their parts of a server.

        Returns:
            SGLang's arguments of the first part.

        Raises:
            EngineError: `withdraw` was called meanwhile, or the nodes did not appear.
            DispatcherGone: the attempt's head is gone.
        """
        self._withdrawn.clear()
        until = time.monotonic() + self._gather_s
        while len(self._hosts) < self._count - 1:
            if self._withdrawn.wait(BEAT_S):
                raise EngineError("the engine was not started: it was asked to end")
            if self._failure is not None:
                raise self._failure
            if time.monotonic() > until:
                self._gone = True
                there = ", ".join(self._hosts) or "none"
                raise EngineError(
                    f"{self._count - 1 - len(self._hosts)} of {self._count - 1} further nodes of the engine did not "
                    f"report within {self._gather_s:.0f} s; present are: {there}"
                )
        (port,) = free_ports(self._address, 1)
        launch = Launch(
            secrets.token_hex(4),
            f"{self._address}:{port}",
            {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
            dict(environment),
            dict(files),
            threads,
        )
        logger.info("engine starts on further nodes hosts=%s address=%s", ",".join(self._hosts), launch.address)
        self._tell(launch)
        return parts_arguments(self._count, 0, launch.address)

    def withdraw(self) -> None:
        """Make the other nodes end their parts."""
        self._withdrawn.set()
        with contextlib.suppress(RunError):
            self._tell(None)

    def _tell(self, *launch: Launch | None) -> None:
        with self._lock:
            if launch:
                (self._launch,) = launch
                self._problem = ""
            told = self._client.lead(self._engine, self._start, self._count, self._launch)
            self._hosts, self._problem = told.hosts, self._problem or told.problem
            self._gone = self._gone or told.gone

    def _beat(self) -> None:
        try:
            while not self._ended.wait(BEAT_S):
                self._tell()
        except BaseException as error:
            self._failure = error


@contextlib.contextmanager
def further_nodes(
    paths: RunDir, attempt: int, engine: str, part: EnginePart, gather_s: float = GATHER_S
) -> Iterator[FurtherNodes | None]:
    """Provide the further nodes of the engine whose first node this is; None if it has no others.

    Args:
        gather_s: see `GATHER_S`.

    Raises:
        RunError: the attempt's head has not published its addresses in time.
    """
    if part.nodes == 1:
        yield None
        return
    rendezvous = wait_for(paths.rendezvous(attempt), attempt, RENDEZVOUS_TIMEOUT_S)
    with (
        contextlib.closing(Client(rendezvous)) as client,
        FurtherNodes(client, engine, part.address, part.nodes, gather_s) as nodes,
    ):
        yield nodes


def follow(paths: RunDir, attempt: int, engine: str, part: EnginePart, log: Path, gather_s: float = GATHER_S) -> None:
    """Work as a further node of an engine until its first one leaves.

    Args:
        log: SGLang's log file.
        gather_s: see `GATHER_S`.

    Raises:
        EngineIncomplete: the first node is lost, or lost another one.
        RunError: the attempt's head is gone.
        UserError: the target can't be copied to this node.
    """
    rendezvous = wait_for(paths.rendezvous(attempt), attempt, RENDEZVOUS_TIMEOUT_S)
    ended = threading.Event()
    with contextlib.closing(Client(rendezvous)) as client, ThreadPoolExecutor(1, "stage") as pool:
        # Meanwhile the first node is to hear that this one is there.
        copied = pool.submit(staging.stage, locate(load_config(paths.config).target.path), ended)
        try:
            _follow(client, engine, part, log, copied, gather_s)
        finally:
            ended.set()


def _follow(
    client: Client, engine: str, part: EnginePart, log: Path, copied: Future[bool], gather_s: float = GATHER_S
) -> None:
    server: SGLangServer | None = None
    ending: threading.Thread | None = None
    """Thread that ends the previous part, which takes longer than a node may be silent if much memory is freed."""
    started = why = ""
    until, beats, met = time.monotonic() + gather_s, -1, False
    try:
        while True:
            if server is not None and not why and not server.alive():
                why = f"its process ended; its log {log} ends:\n{server.log_tail(15)}"
                logger.warning("part ended launch=%s", started)
            told = client.follow(engine, part.rank, socket.gethostname(), started, why)
            if told.over is Over.LEFT:
                logger.info("the engine leaves")
                return
            # The first message may be from a dead first node, whose engine was restarted.
            met, beats = met or -1 < beats < told.beats, told.beats
            if (problem := _lost(told, met)) or (not met and time.monotonic() > until):
                problem = problem or f"its first node did not report within {gather_s:.0f} s"
                raise EngineIncomplete(f"node {part.rank + 1} of {part.nodes} of {engine}: {problem}")
            wanted = told.launch if met else None
            if server is not None and (wanted is None or wanted.id != started):
                ending, server = threading.Thread(target=server.stop), None
                ending.start()
            if copied.done():
                copied.result()
            free = copied.done() and (ending is None or not ending.is_alive())
            if wanted is not None and wanted.id != started and free:
                started, why = wanted.id, ""
                server = _part(wanted, part, log)
            time.sleep(BEAT_S)
    finally:
        if ending is not None:
            ending.join()
        if server is not None:
            server.stop()


def _lost(told: Following, met: bool) -> str:
    """Return why a further node can't continue, once it has met the first one; empty if it can."""
    if not met:
        return ""
    if told.silent:
        return "its first node was lost"
    return "another of its nodes was lost" if told.over is Over.INCOMPLETE else ""


def _part(launch: Launch, part: EnginePart, log: Path) -> SGLangServer:
    """Start this node's part of a server, and return it."""
    server = SGLangServer(
        {**launch.arguments, **parts_arguments(part.nodes, part.rank, launch.address)},
        log,
        launch.environment,
        launch.threads,
        files=launch.files,
    )
    server.begin()
    return server

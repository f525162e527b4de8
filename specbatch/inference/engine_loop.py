"""The loop of an engine: heartbeats, claims, restarts and leaving, whatever it computes."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from specbatch.config import Config
from specbatch.dispatch.client import Client, DispatcherGone
from specbatch.dispatch.messages import Fault, Phase
from specbatch.errors import RunError
from specbatch.inference.server import EngineError
from specbatch.pack_manifest import PackId

logger = logging.getLogger(__name__)


class EngineLoop(ABC):
    """Work for a dispatcher until it says that this engine may leave.

    Three threads share it: the main one starts the server and reports results, one claims work, one sends heartbeats.

    Args:
        name: unique among all engines, earlier ones included.
        log: the server's log file.
    """

    result: str
    """One unit of what the engine computes, with its article, for messages."""

    def __init__(self, config: Config, client: Client, *, name: str, log: Path) -> None:
        self.config, self.client, self.name, self.log = config, client, name, log
        self.state = "starting"
        self._lock = threading.Lock()
        """Guards the claims and what is counted."""
        self._suspects: set[PackId] = set()
        """Packs that were claimed when the server broke."""
        self._restarts = 0
        self._leaving = threading.Event()
        self._room = threading.Event()
        """Set when a claim was settled, or none will be any more: wakes the claiming thread."""
        self._called_away = ""
        self._ended = threading.Event()
        self._failure: BaseException | None = None

    @abstractmethod
    def _serve(self) -> str | None:
        """Start the server and work with it; return why it has to be restarted, or None to leave.

        Raises:
            EngineError: the server did not start; the same as its reason returned.
        """

    @abstractmethod
    def _claims(self) -> dict[int, PackId]:
        """Return the claims that are not settled. Called with the lock held."""

    @abstractmethod
    def _tokens(self) -> int:
        """Return the tokens computed so far. Called with the lock held."""

    @abstractmethod
    def _drop(self, claim: int) -> bool:
        """Forget a claim; return whether it was known. Called with the lock held."""

    @abstractmethod
    def _stop_start(self) -> None:
        """Abort the start of the server, if it is starting."""

    @abstractmethod
    def _before_restart(self, why: str) -> None:
        """Do what else is needed before the server is restarted, after its claims were given back."""

    def run(self) -> None:
        """Work until the dispatcher says that this engine may leave.

        Raises:
            RunError: the server was started too often without a result, or the dispatcher is gone.
        """
        beats = threading.Thread(target=self._guarded, args=(self._beat,), name="heartbeat", daemon=True)
        beats.start()
        try:
            while (why := self._served()) is not None:
                self._restart(why)
            with contextlib.suppress(DispatcherGone):
                self._part()
        finally:
            self._ended.set()
            beats.join()
        if self._failure is not None:
            raise self._failure
        logger.info("engine leaves name=%s tokens=%d", self.name, self._tokens())

    def leave(self, why: str) -> None:
        """Make the engine leave before the dispatcher allows it, from any thread: other engines take over its work."""
        self._called_away = why
        self._leave()

    def _part(self) -> None:
        """Return claims now instead of waiting for heartbeats to lapse, if the engine was told to leave."""
        if self._called_away:
            self._give_back(self._called_away)

    def _give_back(self, why: str) -> None:
        with self._lock:
            claims = list(self._claims())
        for claim in claims:
            self._fail(claim, why, Fault.OTHER)

    def _fail(self, claim: int, why: str, fault: Fault) -> None:
        """Give a claim back, unless it is settled."""
        with self._lock:
            known = self._drop(claim)
        if known:
            self._failed(claim, why, fault)

    def _failed(self, claim: int, why: str, fault: Fault) -> None:
        logger.warning("failed claim=%d fault=%s why=%s", claim, fault.value, why)
        self.client.failed(self.name, claim, why, fault)

    def _served(self) -> str | None:
        try:
            return self._serve()
        except EngineError as error:
            # `leave` stops a server that is still starting.
            return None if self._leaving.is_set() else str(error)

    @contextlib.contextmanager
    def _claiming(self, room: Callable[[], int], claim: Callable[[int, threading.Event], Phase]) -> Iterator[None]:
        """Claim work in a separate thread while the server works.

        Args:
            room: returns how much more can be claimed now.
            claim: claims at most that much and starts it, unless the event says that the server broke.
        """
        self.state = "ready"
        broken = threading.Event()

        def claims() -> None:
            while True:
                # Cleared before anything is checked, so that no later signal is missed.
                self._room.clear()
                if broken.is_set() or self._leaving.is_set():
                    return
                most = room()
                if most < 1:
                    self._room.wait()
                elif claim(most, broken) is not Phase.WORK:
                    self._leaving.set()

        thread = threading.Thread(target=self._guarded, args=(claims,), name="claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            broken.set()
            self._room.set()
            thread.join()

    def _restart(self, why: str) -> None:
        """Give all claims back, and count the restart.

        Raises:
            RunError: the server was started too often without a result.
        """
        self.state = "restarting"
        self._restarts += 1
        logger.warning("engine broke restarts=%d why=%s", self._restarts, why)
        with self._lock:
            claims = dict(self._claims())
        for claim, pack in claims.items():
            # A pack that was claimed both times may be what breaks the engine.
            fault = Fault.PACK if pack in self._suspects else Fault.OTHER
            self._suspects.add(pack)
            self._fail(claim, f"the engine broke: {why.splitlines()[0]}", fault)
        self._before_restart(why)
        if self._restarts > self.config.inference.max_restarts:
            raise RunError(
                f"the engine broke {self._restarts} times without computing {self.result} in between, the last time: "
                f"{why}\nIts log: {self.log}"
            )

    def _beat(self) -> None:
        """Send heartbeats, and follow the dispatcher's answers."""
        tokens, since = 0, time.monotonic()
        while True:
            with self._lock:
                claims, total = list(self._claims()), self._tokens()
            now = time.monotonic()
            rate, tokens, since = (total - tokens) / max(now - since, 1e-3), total, now
            beat = self.client.heartbeat(self.name, claims, self.state, rate)
            for claim in beat.revoked:
                with self._lock:
                    known = self._drop(claim)
                if known:
                    self._room.set()
                    logger.info("revoked claim=%d", claim)
            if beat.phase is not Phase.WORK:
                self._leave()
            if self._ended.wait(self.config.inference.heartbeat_s):
                return

    def _leave(self) -> None:
        self._leaving.set()
        self._room.set()
        if self.state != "ready":
            self._stop_start()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run a thread's work; its failure ends the engine."""
        try:
            work()
        except BaseException as error:
            self._failure = self._failure or error
            self._leave()

"""The dispatcher's server: one thread between the sockets and the state machine.

Only holders of the attempt's client key can connect (CURVE), so a component of another attempt is refused before it
sends a request. Requests that can't be answered yet are held and answered at the next change, or after `LONG_POLL_S`.
Removing garbage from the store may take long and has its own thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Protocol

import msgspec
import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from specbatch.dispatch.connection_file import Keys
from specbatch.dispatch.encoding import CUT_OFF_BYTES, MAX_MESSAGE_BYTES, decode_request, encode
from specbatch.dispatch.messages import (
    LONG_POLL_S,
    Alive,
    AnyReply,
    AnyRequest,
    Claim,
    Done,
    Drain,
    PackRequest,
    Refusals,
    Refused,
    Report,
)
from specbatch.free_ports import free_ports, restricted
from specbatch.pack_manifest import PackId, claim_prefix

logger = logging.getLogger(__name__)

TICK_S = 0.1
BATCH = 256
"""Most messages that are read before held requests are looked at again."""
REMOVE_TRIES = 5


class WriteEvent(Protocol):
    """Records an event; called in the server's thread, so it must not block for long."""

    def __call__(self, event: str, /, **facts: object) -> None: ...


class StateMachine(Protocol):
    """The served state machine, such as `specbatch.dispatch.dispatcher.Dispatcher`."""

    def handle(self, request: PackRequest, now: float, *, last: bool = False) -> AnyReply | None:
        """Answer a request; None if it should be handled again once `version` has changed."""
        ...

    def tick(self, now: float) -> None:
        """Take back the claims of engines that are silent or stuck."""
        ...

    @property
    def version(self) -> int:
        """Changes whenever a held request may have an answer."""
        ...

    def take_events(self) -> list[tuple[str, dict[str, object]]]:
        """Return the events since the last call."""
        ...

    def take_garbage(self) -> list[tuple[PackId, int | None]]:
        """Return the claims whose objects became unneeded since the last call."""
        ...

    def report(self, now: float) -> Report:
        """Return the state of everything."""
        ...


@dataclass(slots=True)
class _HeldRequest:
    """A request without an answer yet."""

    envelope: list[bytes]
    request: PackRequest
    until: float


class Server:
    """Serves a dispatcher, of packs or of prompts, until it is stopped; a context manager.

    The constructor binds the port; requests are answered once the server is entered or started.

    Args:
        keys: keys of the attempt.
        host: address to listen on; only it is bound.
        run: the run's id, the first part of the keys in the store.
        event: is called with every event's name and facts.
        remove_prefix: removes objects from the store by the beginning of their keys; may block and raise.
    """

    def __init__(
        self,
        dispatcher: StateMachine,
        keys: Keys,
        host: str,
        *,
        run: str,
        attempt: int,
        event: WriteEvent,
        remove_prefix: Callable[[str], object],
    ) -> None:
        self._dispatcher, self._event, self._remove_prefix = dispatcher, event, remove_prefix
        self._run_id, self._attempt = run, attempt
        self._allowed = z85.decode(keys.client_public)
        self._context = zmq.Context()
        self._door = self._context.socket(zmq.REP)
        self._door.bind("inproc://zeromq.zap.01")
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_secretkey = keys.server_secret.encode()
        self._socket.zap_domain = b"specbatch"
        self._socket.setsockopt(zmq.MAXMSGSIZE, CUT_OFF_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.port = self._listen(host)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        self._lock = threading.Lock()
        self._drains: SimpleQueue[str] = SimpleQueue()
        self._garbage: SimpleQueue[tuple[PackId, int | None] | None] = SimpleQueue()
        self._held: dict[object, _HeldRequest] = {}
        self._heard: dict[str, float] = {}
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._refused = Refusals()

    def _listen(self, host: str) -> int:
        if not restricted():
            return self._socket.bind_to_random_port(f"tcp://{host}")
        while True:
            (port,) = free_ports(host, 1)
            try:
                self._socket.bind(f"tcp://{host}:{port}")
            except zmq.ZMQError:
                # Another process took the port first.
                continue
            return port

    def start(self) -> None:
        """Start to answer requests."""
        self._threads = [
            threading.Thread(target=self._serve, name="dispatcher", daemon=True),
            threading.Thread(target=self._remove_garbage, name="garbage", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop answering requests."""
        self._stop.set()
        self._garbage.put(None)
        for thread in self._threads:
            thread.join(timeout=10)
        self._context.destroy(linger=0)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def report(self) -> Report:
        """The state of all.

        Raises:
            RuntimeError: the server's thread ended by an error, which is a defect.
        """
        if self._failure is not None:
            raise RuntimeError("the dispatcher's thread ended") from self._failure
        with self._lock:
            return self._with_refusals(self._dispatcher.report(time.monotonic()))

    def silent(self) -> dict[str, float]:
        """Return the seconds since the last sign of life of each component's task."""
        with self._lock:
            now = time.monotonic()
            return {name: now - heard for name, heard in self._heard.items()}

    def drain(self, why: str) -> None:
        """End the attempt after the current step; can be called in a signal handler."""
        self._drains.put(why)

    def _serve(self) -> None:
        try:
            self._answer_until_stopped()
        except BaseException as error:  # shown to whoever asks for a report
            self._failure = error
            logger.exception("dispatcher ended by an error")

    def _answer_until_stopped(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._door, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        version, ticked = -1, 0.0
        while not self._stop.is_set():
            ready = dict(poller.poll(int(TICK_S * 1000)))
            if self._door in ready:
                self._let_in()
            if self._monitor in ready:
                self._count_failed_handshakes()
            with self._lock:
                now = time.monotonic()
                if self._socket in ready:
                    self._read(now)
                self._heed_drains(now)
                due = now - ticked >= TICK_S
                if due:
                    self._dispatcher.tick(now)
                    ticked = now
                if due or self._dispatcher.version != version:
                    version = self._dispatcher.version
                    self._look_again(now)
                events, garbage = self._dispatcher.take_events(), self._dispatcher.take_garbage()
            for name, facts in events:
                self._tell(name, facts)
            for item in garbage:
                self._garbage.put(item)

    def _tell(self, name: str, facts: dict[str, object]) -> None:
        try:
            self._event(name, **facts)
        except OSError as error:
            # A full disk loses the event, but must not end the run.
            logger.warning("event not written event=%s why=%s", name, error)

    def _let_in(self) -> None:
        """Answer libzmq's requests to authenticate a connection (RFC 27, ZAP)."""
        version, request_id, _domain, address, _identity, mechanism, *credentials = self._door.recv_multipart()
        known = mechanism == b"CURVE" and credentials == [self._allowed]
        if not known:
            logger.warning(
                "refused a connection with another attempt's key address=%s", address.decode(errors="replace")
            )
        verdict = (b"200", b"OK") if known else (b"400", b"not a key of this attempt")
        self._door.send_multipart([version, request_id, *verdict, b"", b""])

    def _count_failed_handshakes(self) -> None:
        """Count peers with another key or protocol, and peers that left before their key was seen."""
        while self._monitor.poll(0):
            left = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            self._refuse(**{"left" if left else "peers": 1})

    def _refuse(self, **one: int) -> None:
        """Count."""
        counts = {name: getattr(self._refused, name) + more for name, more in one.items()}
        self._refused = msgspec.structs.replace(self._refused, **counts)

    def _with_refusals(self, report: Report) -> Report:
        return msgspec.structs.replace(report, refused=self._refused)

    def _read(self, now: float) -> None:
        for _ in range(BATCH):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            envelope = [frames[0], b""]
            try:
                request = _request_in(frames)
            except msgspec.DecodeError as error:
                logger.warning("refused an invalid message why=%s", error)
                self._send(envelope, Refused(f"not a request: {error}"), messages=1)
                continue
            if isinstance(request, Alive):
                self._heard[request.name] = now
                self._send(envelope, Done())
            else:
                self._handle(_HeldRequest(envelope, request, now + LONG_POLL_S), now)

    def _handle(self, held: _HeldRequest, now: float) -> None:
        if isinstance(held.request, Claim):
            # A claim that is sent again replaces the first one: a pack granted to an abandoned request would be lost.
            key: object = held.request.engine
        else:
            key = tuple(held.envelope)
        self._held.pop(key, None)
        reply = self._dispatcher.handle(held.request, now)
        if reply is None:
            self._held[key] = held
        else:
            self._send(held.envelope, reply)

    def _look_again(self, now: float) -> None:
        for key, held in list(self._held.items()):
            reply = self._dispatcher.handle(held.request, now, last=now >= held.until)
            if reply is not None:
                del self._held[key]
                self._send(held.envelope, reply)

    def _send(self, envelope: list[bytes], reply: AnyReply, *, messages: int = 0) -> None:
        if isinstance(reply, Refused):
            self._refuse(messages=messages, requests=1 - messages)
        if isinstance(reply, Report):
            reply = self._with_refusals(reply)
        try:
            self._socket.send_multipart([*envelope, encode(reply)], zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("a reply could not be sent; its receiver will ask again")

    def _heed_drains(self, now: float) -> None:
        while True:
            try:
                why = self._drains.get_nowait()
            except Empty:
                return
            self._dispatcher.handle(Drain(why), now)

    def _remove_garbage(self) -> None:
        """Remove objects that are no longer needed; failures are tried again a little later."""
        while (item := self._garbage.get()) is not None:
            pack, claim = item
            prefix = claim_prefix(self._run_id, self._attempt, pack, claim or 0)
            if claim is None:
                prefix = prefix.removesuffix("0/")
            for tries in range(1, REMOVE_TRIES + 1):
                try:
                    self._remove_prefix(prefix)
                    break
                except Exception as error:  # the store's, of any kind: garbage must never end the run
                    logger.warning("garbage not removed prefix=%s tries=%d why=%s", prefix, tries, error)
                    if self._stop.wait(tries):
                        return


def _request_in(frames: list[bytes]) -> AnyRequest:
    """Return the request in a peer's frames: its name, an empty frame, and the request.

    Raises:
        msgspec.DecodeError: it is not a valid request.
    """
    size = sum(map(len, frames))
    if size > MAX_MESSAGE_BYTES:
        raise msgspec.DecodeError(f"{size} bytes are more than {MAX_MESSAGE_BYTES}")
    if len(frames) != 3 or frames[1]:
        raise msgspec.DecodeError(f"a message in {len(frames)} parts")
    return decode_request(frames[2])

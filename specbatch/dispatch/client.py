"""How components ask the dispatcher: one method per request, from any thread.

Every request is answered or raises. A request that gets no answer is sent again on a new connection until the
deadline: all requests may arrive twice (see `specbatch.dispatch.state`).
"""

from __future__ import annotations

import threading
import time
from typing import TypeVar

import msgspec
import zmq

from specbatch.dispatch.messages import (
    LONG_POLL_S,
    MAX_MESSAGE_BYTES,
    Alive,
    AnyRequest,
    Beat,
    Begin,
    Claim,
    Claims,
    Done,
    Drain,
    Failed,
    Fault,
    Go,
    Heartbeat,
    Join,
    Lost,
    Packs,
    Refused,
    Reply,
    Report,
    Status,
    Stored,
    Trained,
    Trouble,
    Wait,
    decode_reply,
    encode,
)
from specbatch.dispatch.rendezvous import Rendezvous
from specbatch.errors import AttemptError, RunError
from specbatch.manifest import Manifest, PackId

AnyReplyT = TypeVar("AnyReplyT", bound=Reply)
TRY_S = LONG_POLL_S + 4.0
"""After so long without an answer a request is sent again."""


class DispatcherGone(AttemptError):
    """The dispatcher did not answer within the deadline: the head is gone, or cut off from here."""


class RequestRefused(RunError):
    """The dispatcher says that the request made no sense: a defect of the sender, or a world that is over."""


class Client:
    """Asks the dispatcher of one attempt.

    Args:
        deadline_s: after so long without an answer a request raises `DispatcherGone`.

    All methods raise `DispatcherGone` and `RequestRefused`.
    """

    def __init__(self, rendezvous: Rendezvous, *, deadline_s: float = 30.0) -> None:
        self._rendezvous, self._deadline_s = rendezvous, deadline_s
        self._address = f"tcp://{rendezvous.host}:{rendezvous.dispatcher_port}"
        self._context = zmq.Context()
        self._lock = threading.Lock()
        self._idle: list[zmq.Socket[bytes]] = []
        self._closed = False
        self._generation = 0
        """Of the rank that joined."""

    def claim(self, engine: str, most: int) -> Claims:
        """Packs to compute, at most ``most``; returns after at most about `LONG_POLL_S`, possibly without any."""
        return self._ask(Claim(engine, most), Claims)

    def stored(self, engine: str, manifests: list[Manifest]) -> None:
        """Report what was put into the store. Claims that are no longer the engine's are ignored."""
        self._ask(Stored(engine, tuple(manifests)), Done)

    def failed(self, engine: str, claim: int, why: str, fault: Fault = Fault.PACK) -> None:
        """Give a claim back that can't be computed."""
        self._ask(Failed(engine, claim, why, fault), Done)

    def heartbeat(self, engine: str, claims: list[int], state: str, tokens_per_s: float = 0.0) -> Beat:
        """Name every claim that is being worked on: those that are not named are given to others."""
        return self._ask(Heartbeat(engine, tuple(claims), state, tokens_per_s), Beat)

    def join(self, rank: int, world: int, segment: str, segment_bytes: int, step: int, generation: int = 0) -> None:
        """Join the world of ranks after ``step`` trained steps.

        Args:
            generation: how often the ranks were started again (``TORCHELASTIC_RESTART_COUNT``).
        """
        self._generation = generation
        self._ask(Join(rank, world, segment, segment_bytes, step, generation), Done)

    def wait(self, rank: int, packs: list[PackId]) -> Packs:
        """Those of ``packs`` that are stored or void; after at most about `LONG_POLL_S` possibly none."""
        return self._ask(Wait(rank, tuple(packs), self._generation), Packs)

    def begin(self, rank: int, step: int) -> Go:
        """Whether the step may be trained; after at most about `LONG_POLL_S` possibly not yet."""
        return self._ask(Begin(rank, step, self._generation), Go)

    def lost(self, rank: int, pack: PackId, claim: int, why: str) -> None:
        """What this claim's manifest names is not there, or not what it was: have it computed again."""
        self._ask(Lost(rank, pack, claim, why, self._generation), Done)

    def trained(self, rank: int, step: int) -> None:
        """Report a step as trained, after its packs were removed from the store."""
        self._ask(Trained(rank, step, self._generation), Done)

    def drain(self, why: str) -> None:
        """End the attempt at the next step's boundary."""
        self._ask(Drain(why), Done)

    def trouble(self, what: str, why: str) -> None:
        """Tell people that something can't be written; or, with an empty reason, that it can again."""
        self._ask(Trouble(what, why), Done)

    def alive(self, name: str) -> None:
        """Say that a component's task lives."""
        self._ask(Alive(name), Done)

    def status(self) -> Report:
        """The state of all, for people."""
        return self._ask(Status(), Report)

    def close(self) -> None:
        """Close the connections; requests of other threads end with `DispatcherGone`."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close(linger=0)
        self._context.term()

    def _ask(self, request: AnyRequest, expected: type[AnyReplyT]) -> AnyReplyT:
        data = encode(request)
        until = time.monotonic() + self._deadline_s
        try:
            while (left := until - time.monotonic()) > 0:
                answer = self._try(data, min(TRY_S, left))
                if answer is not None:
                    return self._read(request, answer, expected)
        except zmq.ContextTerminated:
            raise DispatcherGone("the connection to the dispatcher was closed here") from None
        raise DispatcherGone(
            f"the dispatcher at {self._address} did not answer {type(request).__name__.lower()} "
            f"within {self._deadline_s:.0f} s"
        )

    def _try(self, data: bytes, timeout_s: float) -> bytes | None:
        """Ask once. A connection that gave no answer is given up: what comes late is nobody's."""
        connection = self._connection()
        good = False
        try:
            connection.send(data)
            if connection.poll(int(timeout_s * 1000) + 1):
                answer = connection.recv()
                good = True
                return answer
            return None
        finally:
            with self._lock:
                keep = good and not self._closed
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close(linger=0)

    def _connection(self) -> zmq.Socket[bytes]:
        with self._lock:
            if self._closed:
                raise zmq.ContextTerminated
            if self._idle:
                return self._idle.pop()
            connection = self._context.socket(zmq.REQ)
        connection.setsockopt(zmq.LINGER, 0)
        connection.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_MESSAGE_BYTES)
        connection.curve_serverkey = self._rendezvous.server_public.encode()
        connection.curve_publickey = self._rendezvous.client_public.encode()
        connection.curve_secretkey = self._rendezvous.client_secret.encode()
        connection.connect(self._address)
        return connection

    def _read(self, request: AnyRequest, answer: bytes, expected: type[AnyReplyT]) -> AnyReplyT:
        try:
            reply = decode_reply(answer)
        except msgspec.DecodeError as error:
            raise RequestRefused(f"the dispatcher's answer makes no sense: {error}") from error
        if isinstance(reply, Refused):
            raise RequestRefused(f"the dispatcher refused {type(request).__name__.lower()}: {reply.why}")
        if not isinstance(reply, expected):
            raise RequestRefused(f"the dispatcher answered {type(request).__name__} by {type(reply).__name__}")
        return reply

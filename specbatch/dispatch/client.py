"""The dispatcher's client: one method for each request, callable from any thread.

Every call returns a reply or raises. A request without an answer is sent again on a new connection until the deadline,
so any request may arrive twice (see `specbatch.dispatch.dispatcher`).
"""

from __future__ import annotations

import threading
import time
from typing import TypeVar

import msgspec
import zmq

from specbatch.dispatch.connection_file import ConnectionFile
from specbatch.dispatch.encoding import MAX_MESSAGE_BYTES, decode_reply, encode
from specbatch.dispatch.messages import (
    LONG_POLL_S,
    Alive,
    Answer,
    Answered,
    AnyRequest,
    Beat,
    Begin,
    Claim,
    Claims,
    Done,
    Drain,
    Failed,
    Fault,
    Follow,
    Following,
    Go,
    Heartbeat,
    Join,
    Launch,
    Lead,
    Led,
    Lost,
    Over,
    Packs,
    Prompts,
    Refused,
    Reply,
    Report,
    StatusRequest,
    Stored,
    Trained,
    Trouble,
    Wait,
)
from specbatch.errors import AttemptError, RunError
from specbatch.pack_manifest import Manifest, PackId

AnyReplyT = TypeVar("AnyReplyT", bound=Reply)
TRY_S = LONG_POLL_S + 4.0
"""Seconds without an answer after which a request is sent again."""


class DispatcherGone(AttemptError):
    """The dispatcher did not answer within the deadline: the head is gone, or cut off from here."""


class DispatcherRefused(RunError):
    """The dispatcher refused the request as invalid: a defect of the sender, or ranks of a world that has ended."""


class Client:
    """Sends requests to the dispatcher of one attempt.

    Args:
        deadline_s: seconds without an answer after which a request raises `DispatcherGone`.

    All methods raise `DispatcherGone` and `DispatcherRefused`.
    """

    def __init__(self, rendezvous: ConnectionFile, *, deadline_s: float = 30.0) -> None:
        self._rendezvous, self._deadline_s = rendezvous, deadline_s
        self._address = f"tcp://{rendezvous.host}:{rendezvous.dispatcher_port}"
        self._context = zmq.Context()
        self._lock = threading.Lock()
        self._idle: list[zmq.Socket[bytes]] = []
        self._closed = False
        self._generation = 0
        """Generation of the rank that joined."""

    def claim(self, engine: str, most: int) -> Claims:
        """Claim at most ``most`` packs to compute; returns after at most about `LONG_POLL_S`, possibly without any."""
        return self._ask(Claim(engine, most), Claims)

    def stored(self, engine: str, manifests: list[Manifest]) -> None:
        """Report what was put into the store. Claims that are no longer the engine's are ignored."""
        self._ask(Stored(engine, tuple(manifests)), Done)

    def claim_prompts(self, engine: str, most: int) -> Prompts:
        """Claim prompts to answer, as `claim` does packs."""
        return self._ask(Claim(engine, most), Prompts)

    def answered(self, engine: str, answers: list[Answer]) -> None:
        """Hand over answers; returns when they are saved. Claims that are no longer the engine's are ignored."""
        self._ask(Answered(engine, tuple(answers)), Done)

    def failed(self, engine: str, claim: int, why: str, fault: Fault = Fault.PACK) -> None:
        """Give back a claim that can't be computed."""
        self._ask(Failed(engine, claim, why, fault), Done)

    def heartbeat(self, engine: str, claims: list[int], state: str, tokens_per_s: float = 0.0) -> Beat:
        """Send a heartbeat that names every claim in progress; claims that are not named are given to others."""
        return self._ask(Heartbeat(engine, tuple(claims), state, tokens_per_s), Beat)

    def lead(self, engine: str, start: str, nodes: int, launch: Launch | None, over: Over = Over.NOT) -> Led:
        """Report, as the first of an engine's nodes, what all of them run; return the state of the others."""
        return self._ask(Lead(engine, start, nodes, launch, over), Led)

    def follow(self, engine: str, node: int, host: str, launch: str, why: str) -> Following:
        """Report what this further node of an engine runs, or why that ended; return what it should run."""
        return self._ask(Follow(engine, node, host, launch, why), Following)

    def join(self, rank: int, world: int, segment: str, segment_bytes: int, step: int, generation: int = 0) -> None:
        """Join the world of ranks after ``step`` trained steps.

        Args:
            generation: restarts of the ranks so far (``TORCHELASTIC_RESTART_COUNT``).
        """
        self._generation = generation
        self._ask(Join(rank, world, segment, segment_bytes, step, generation), Done)

    def wait(self, rank: int, packs: list[PackId]) -> Packs:
        """Return those of ``packs`` that are stored or void; after at most about `LONG_POLL_S`, possibly none."""
        return self._ask(Wait(rank, tuple(packs), self._generation), Packs)

    def begin(self, rank: int, step: int) -> Go:
        """Return whether the step may be trained; after at most about `LONG_POLL_S`, possibly "not yet"."""
        return self._ask(Begin(rank, step, self._generation), Go)

    def lost(self, rank: int, pack: PackId, claim: int, why: str) -> None:
        """Report that objects of this claim's manifest are missing or changed, so that the pack is computed again."""
        self._ask(Lost(rank, pack, claim, why, self._generation), Done)

    def trained(self, rank: int, step: int) -> None:
        """Report a step as trained, after its packs were removed from the store."""
        self._ask(Trained(rank, step, self._generation), Done)

    def drain(self, why: str) -> None:
        """End the attempt after the current step."""
        self._ask(Drain(why), Done)

    def trouble(self, what: str, why: str) -> None:
        """Report for people that something can't be written or, with an empty reason, that it can be again."""
        self._ask(Trouble(what, why), Done)

    def alive(self, name: str) -> None:
        """Report that a component's task is alive."""
        self._ask(Alive(name), Done)

    def status(self) -> Report:
        """Return the state of everything, for people."""
        return self._ask(StatusRequest(), Report)

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
            raise DispatcherGone("this process has closed its connection to the dispatcher") from None
        raise DispatcherGone(
            f"the dispatcher at {self._address} did not answer {type(request).__name__.lower()} "
            f"within {self._deadline_s:.0f} s"
        )

    def _try(self, data: bytes, timeout_s: float) -> bytes | None:
        """Send the request once. A connection that gave no answer is closed: a late reply is discarded."""
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
            raise DispatcherRefused(f"the dispatcher's answer makes no sense: {error}") from error
        if isinstance(reply, Refused):
            raise DispatcherRefused(f"the dispatcher refused {type(request).__name__.lower()}: {reply.why}")
        if not isinstance(reply, expected):
            raise DispatcherRefused(f"the dispatcher answered {type(request).__name__} by {type(reply).__name__}")
        return reply

"""What the components say to each other: small typed structs, metadata only.

Every request carries the attempt by being encrypted with its keys, and gets exactly one reply. ``wait``,
``begin`` and ``claim`` are long polls: the server keeps the reply back until there is something to say,
at most ``LONG_POLL_S``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TypeVar

import msgspec

from specbatch.manifest import Manifest, PackId

LONG_POLL_S = 1.0
_T = TypeVar("_T")


class Phase(enum.StrEnum):
    """What everybody is to do."""

    WORK = "work"
    """Engines claim, trainers train."""
    TRAINED = "trained"
    """All steps are trained: engines may leave."""
    STOP = "stop"
    """The attempt ends before its last step: trainers save after the step they were let into."""


class Request(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """Base of all requests."""


class Reply(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """Base of all replies."""


# Engines


class Claim(Request, frozen=True):
    """Give me packs to compute. Answered by `Claims`, possibly without any."""

    engine: str
    most: int
    """How many packs it can take now."""


class Granted(msgspec.Struct, frozen=True):
    """One claim: given once and never again."""

    claim: int
    pack: PackId
    segment: str
    """Name of the store segment of the rank that will train the pack; empty: anywhere."""


class Claims(Reply, frozen=True):
    granted: tuple[Granted, ...]
    phase: Phase


class Stored(Request, frozen=True):
    """The objects of these claims are in the store. Answered by `Done`."""

    engine: str
    manifests: tuple[Manifest, ...]


class Fault(enum.StrEnum):
    """Whose fault it was that a claim failed."""

    PACK = "pack"
    """The pack's, as far as the engine can tell: several such failures make it void."""
    FULL = "full"
    """There was no room in the store: the dispatcher makes the window smaller."""
    OTHER = "other"
    """The engine or the store broke: the pack is as good as before."""


class Failed(Request, frozen=True):
    """A claim could not be computed. Answered by `Done`."""

    engine: str
    claim: int
    why: str
    fault: Fault = Fault.PACK


class Heartbeat(Request, frozen=True):
    """An engine lives and works on these claims. Answered by `Beat`."""

    engine: str
    claims: tuple[int, ...]
    state: str
    """For people: ``starting``, ``ready``, ``restarting``, ..."""
    tokens_per_s: float = 0.0


class Beat(Reply, frozen=True):
    phase: Phase
    revoked: tuple[int, ...]
    """Claims among those named that are no longer the engine's."""


# Trainer ranks


class Join(Request, frozen=True):
    """A rank starts, or starts again, after ``step`` trained steps. Answered by `Done`.

    Segments of ranks that are gone took their objects with them, so what was stored there is free again.
    A step below the last trained one rewinds the window. A world is complete when all its ranks joined;
    `Go` is given to a complete world only.
    """

    rank: int
    world: int
    segment: str
    segment_bytes: int
    step: int
    generation: int = 0
    """How often the ranks were started again: those of one world have the same number, a later one's world replaces
    it, and what ranks of an earlier one still say is refused. Where nobody counts, a rank that joins again with other
    memory starts a new world."""


class Wait(Request, frozen=True):
    """Where are these packs? Answered by `Packs` as soon as one of them is there."""

    rank: int
    packs: tuple[PackId, ...]
    generation: int = 0


class Packs(Reply, frozen=True):
    stored: tuple[Manifest, ...]
    void: tuple[tuple[PackId, str], ...]
    """Packs that no engine can compute, and why: they train as zero."""
    phase: Phase


class Begin(Request, frozen=True):
    """May I train this step? Answered by `Go`.

    The answer is the same for all ranks of a step: once one was let in, all are.
    """

    rank: int
    step: int
    generation: int = 0


class Go(Reply, frozen=True):
    go: bool
    """False: ask again, or stop if the phase says so."""
    phase: Phase
    why: str = ""


class Lost(Request, frozen=True):
    """What this claim's manifest names is not in the store, or not what it was. Answered by `Done`."""

    rank: int
    pack: PackId
    claim: int
    why: str
    generation: int = 0


class Trained(Request, frozen=True):
    """A rank finished a step and removed its packs from the store. Answered by `Done`."""

    rank: int
    step: int
    generation: int = 0


# Anybody


class Drain(Request, frozen=True):
    """End the attempt at the next step's boundary. Answered by `Done`."""

    why: str


class Trouble(Request, frozen=True):
    """Something can't be written, and training goes on all the same. Answered by `Done`."""

    what: str
    """As ``snapshot``."""
    why: str
    """Empty: it is over."""


class Alive(Request, frozen=True):
    """A component's task lives, and its node reaches the head's. Answered by `Done`."""

    name: str
    """``inference-0``"""


class Status(Request, frozen=True):
    """Answered by `Report`."""


class Done(Reply, frozen=True):
    """Heard."""


class Refused(Reply, frozen=True):
    """The request made no sense here; the sender's mistake."""

    why: str


class EngineReport(msgspec.Struct, frozen=True):
    name: str
    state: str
    claims: int
    last_heard_s: float
    tokens_per_s: float
    packs: int
    """Packs that it stored."""


class Refusals(msgspec.Struct, frozen=True):
    """What the server refused since it started."""

    peers: int = 0
    """Connections without the attempt's key."""
    messages: int = 0
    """Messages of known peers that were no request, or too long."""
    requests: int = 0
    """Requests that made no sense."""


class Report(Reply, frozen=True):
    phase: Phase
    why: str
    step: int
    """Steps that all ranks trained."""
    steps: int
    free: int
    claimed: int
    stored: int
    """Packs of the window in each state."""
    stored_bytes: int
    budget_bytes: int
    engines: tuple[EngineReport, ...]
    ranks: int
    """Ranks that joined."""
    waiting: tuple[tuple[int, PackId], ...]
    """Which rank waits for which pack."""
    lost: int
    failed: int
    void: tuple[tuple[PackId, str], ...]
    error: str = ""
    """Why the run can never go on like this; empty if it can."""
    refused: Refusals = Refusals()
    troubles: tuple[tuple[str, str], ...] = ()
    """What can't be written, and why."""


PackRequest = Claim | Stored | Failed | Heartbeat | Join | Wait | Begin | Lost | Trained | Drain | Status | Trouble
"""What the state machine answers."""
AnyRequest = PackRequest | Alive
AnyReply = Claims | Beat | Packs | Go | Done | Refused | Report


MAX_MESSAGE_BYTES = 16 << 20
"""Longer messages are refused; a manifest takes some 80 bytes a chunk."""
CUT_OFF_BYTES = 256 << 20
"""So much is read of a message, to refuse it in words and count it. ZeroMQ ends the connection of a longer one and
tells nobody; without that bound, one message could take all memory of the head's node."""

encode = msgspec.msgpack.Encoder().encode
"""Any request or reply as it goes over the wire."""
_requests: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
_replies: msgspec.msgpack.Decoder[AnyReply] = msgspec.msgpack.Decoder(AnyReply)


def decode_request(data: bytes) -> AnyRequest:
    """Validated; raises `msgspec.DecodeError`, and nothing else, whatever the data."""
    return _decode(_requests.decode, data)


def decode_reply(data: bytes) -> AnyReply:
    """As `decode_request`."""
    return _decode(_replies.decode, data)


def _decode(decode: Callable[[bytes], _T], data: bytes) -> _T:
    try:
        return decode(data)
    except (UnicodeDecodeError, RecursionError) as error:
        # msgspec lets them pass: a string that is no UTF-8, and lists in lists without end.
        raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from error

"""Messages between the components: small typed structs with metadata only.

A request is encrypted with the keys of its attempt and gets exactly one reply. ``wait``, ``begin`` and ``claim`` are
long polls: the server holds the reply back until there is something to report, for at most ``LONG_POLL_S``.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from specbatch.pack_manifest import Manifest, PackId

LONG_POLL_S = 1.0


class Phase(enum.StrEnum):
    """The phase of the attempt, which tells all components what to do."""

    WORK = "work"
    """Engines claim, trainers train."""
    TRAINED = "trained"
    """All steps are trained, or all prompts answered: engines may exit."""
    STOP = "stop"
    """The attempt ends before its last step: trainers save after the step that they began."""


class Request(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """Base of all requests."""


class Reply(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """Base of all replies."""


# Engines


class Claim(Request, frozen=True):
    """Requests packs to compute, or prompts to answer. Answered by `Claims` or `Prompts`, possibly without any."""

    engine: str
    most: int
    """Number of packs, or prompts, that the engine can take now."""


class Granted(msgspec.Struct, frozen=True):
    """One claim; its number is used only once."""

    claim: int
    pack: PackId
    segment: str
    """Name of the store segment of the rank that will train the pack; empty for any segment."""


class Claims(Reply, frozen=True):
    granted: tuple[Granted, ...]
    phase: Phase


class Prompt(msgspec.Struct, frozen=True):
    """One claim for an answer; its number is used only once."""

    claim: int
    prompt: PackId
    """Number of the row, from 1, and index of the answer, from 0."""
    place: str
    """File and line of the row, for people."""
    row: bytes
    """The row, as JSON."""


class Prompts(Reply, frozen=True):
    granted: tuple[Prompt, ...]
    phase: Phase


class Answer(msgspec.Struct, frozen=True):
    """The result of a prompt."""

    claim: int
    prompt: PackId
    row: bytes = b""
    """The row with the target's answers, as JSON; empty if there is a reason."""
    reason: str = ""
    detail: str = ""
    """Why there is no answer: the reason, by which they are counted, and details of this one."""
    ways: tuple[str, ...] = ()
    """How each answer of the conversation was written."""
    tokens: int = 0
    """Number of generated tokens."""


class Answered(Request, frozen=True):
    """Delivers results of prompts. Answered by `Done` once they are saved."""

    engine: str
    answers: tuple[Answer, ...]


class Stored(Request, frozen=True):
    """Reports that the objects of these claims are in the store. Answered by `Done`."""

    engine: str
    manifests: tuple[Manifest, ...]


class Fault(enum.StrEnum):
    """Cause of a failed claim."""

    PACK = "pack"
    """The pack is the cause, as far as the engine can tell: several such failures make it void."""
    FULL = "full"
    """There was no room in the store: the dispatcher makes the window smaller."""
    OTHER = "other"
    """The engine or the store broke: the pack is not to blame."""


class Failed(Request, frozen=True):
    """Reports that a claim could not be computed. Answered by `Done`."""

    engine: str
    claim: int
    why: str
    fault: Fault = Fault.PACK


class Heartbeat(Request, frozen=True):
    """Reports that an engine is alive and works on these claims. Answered by `Beat`."""

    engine: str
    claims: tuple[int, ...]
    state: str
    """State for people: ``starting``, ``ready``, ``restarting``, ..."""
    tokens_per_s: float = 0.0


class Beat(Reply, frozen=True):
    phase: Phase
    revoked: tuple[int, ...]
    """Claims among those named that are no longer the engine's."""


# Nodes of an engine that spans several


class Launch(msgspec.Struct, frozen=True):
    """A server on several nodes: what each of them starts, with its own rank."""

    id: str
    """Differs from that of every earlier launch."""
    address: str
    """Host and port on the first node at which the ranks meet."""
    arguments: dict[str, Any]
    environment: dict[str, str]
    files: dict[str, bytes]
    """Contents of files, by the variable that names the file."""
    threads: int | None


class Over(enum.StrEnum):
    """How an engine's first node ended."""

    NOT = ""
    LEFT = "left"
    """The work is complete."""
    INCOMPLETE = "incomplete"
    """Another node was lost: all have to be restarted."""


class Lead(Request, frozen=True):
    """Reports that the first node of an engine is alive, and what it has launched, if anything. Answered by `Led`."""

    engine: str
    start: str
    """Differs from that of every earlier start of this engine."""
    nodes: int
    launch: Launch | None
    over: Over = Over.NOT


class Led(Reply, frozen=True):
    hosts: tuple[str, ...]
    """Further nodes that are present."""
    problem: str
    """Why the launched server can't continue; empty if it can."""
    gone: bool
    """Whether the reason is a silent node."""


class Follow(Request, frozen=True):
    """Reports that a further node of an engine is alive. Answered by `Following`."""

    engine: str
    node: int
    """From 1."""
    host: str
    launch: str
    """Id of the last launch that it started; empty if none yet."""
    why: str
    """Why its part of that launch ended; empty while it runs."""


class Following(Reply, frozen=True):
    launch: Launch | None
    over: Over
    beats: int
    """Number of reports from the first node, over all starts of the engine."""
    silent: bool
    """Whether the first node has reported before, but no longer does."""


# Trainer ranks


class Join(Request, frozen=True):
    """Reports that a rank starts or restarts after ``step`` trained steps. Answered by `Done`.

    When ranks end, the objects in their memory are gone, so packs that were stored there are free again. A step below
    the last trained one rewinds the window. A world (the ranks of one start) is complete when all its ranks have
    joined; only a complete world gets `Go`.
    """

    rank: int
    world: int
    segment: str
    segment_bytes: int
    step: int
    generation: int = 0
    """Restarts of the ranks so far, the same for all ranks of a world. A later world replaces an earlier one, whose
    ranks' requests are refused from then on. Without a count, a rank that joins again with other memory starts a new
    world."""


class Wait(Request, frozen=True):
    """Asks where packs are stored. Answered by `Packs` as soon as one of them is stored."""

    rank: int
    packs: tuple[PackId, ...]
    generation: int = 0


class Packs(Reply, frozen=True):
    stored: tuple[Manifest, ...]
    void: tuple[tuple[PackId, str], ...]
    """Packs that no engine can compute, and why; they train as zero."""
    phase: Phase


class Begin(Request, frozen=True):
    """Asks whether a step may be trained. Answered by `Go`.

    The answer is the same for all ranks of a step: once one rank may begin it, all may.
    """

    rank: int
    step: int
    generation: int = 0


class Go(Reply, frozen=True):
    go: bool
    """Whether to begin. If false, ask again, or stop if the phase says so."""
    phase: Phase
    why: str = ""


class Lost(Request, frozen=True):
    """Reports that objects of this claim's manifest are missing or changed. Answered by `Done`."""

    rank: int
    pack: PackId
    claim: int
    why: str
    generation: int = 0


class Trained(Request, frozen=True):
    """Reports that a rank finished a step and removed its packs from the store. Answered by `Done`."""

    rank: int
    step: int
    generation: int = 0


# Any component


class Drain(Request, frozen=True):
    """Asks to end the attempt after the current step. Answered by `Done`."""

    why: str


class Trouble(Request, frozen=True):
    """Reports that a file can't be written, although training continues. Answered by `Done`."""

    what: str
    """Kind of the file, for example ``snapshot``."""
    why: str
    """The reason; empty if the file can be written again."""


class Alive(Request, frozen=True):
    """Reports that a component's task is alive and its node reaches the head. Answered by `Done`."""

    name: str
    """``inference-0``"""


class StatusRequest(Request, frozen=True):
    """Asks for the state of everything. Answered by `Report`."""


class Done(Reply, frozen=True):
    """Heard."""


class Refused(Reply, frozen=True):
    """The request was invalid: the sender's mistake."""

    why: str


class EngineReport(msgspec.Struct, frozen=True):
    name: str
    state: str
    claims: int
    last_heard_s: float
    tokens_per_s: float
    packs: int
    """Number of packs that it stored."""


class Refusals(msgspec.Struct, frozen=True):
    """Counts of what the server has refused since it started."""

    peers: int = 0
    """Connections with another key than the attempt's, or of another protocol."""
    left: int = 0
    """Connections that the peer closed before it identified itself: a process that ended while it connected, or a port
    scan. These count as left, not as refused."""
    messages: int = 0
    """Messages of known peers that were not requests, or too long."""
    requests: int = 0
    """Invalid requests."""


class Report(Reply, frozen=True):
    phase: Phase
    why: str
    step: int
    """Number of steps that all ranks have trained."""
    steps: int
    free: int
    claimed: int
    stored: int
    """Packs of the window in each state."""
    stored_bytes: int
    budget_bytes: int
    engines: tuple[EngineReport, ...]
    ranks: int
    """Number of ranks that have joined."""
    waiting: tuple[tuple[int, PackId], ...]
    """Ranks, and the pack that each waits for."""
    lost: int
    failed: int
    void: tuple[tuple[PackId, str], ...]
    error: str = ""
    """Why the run can never continue with this configuration; empty if it can."""
    refused: Refusals = Refusals()
    troubles: tuple[tuple[str, str], ...] = ()
    """Kinds of files that can't be written, and why."""


PackRequest = (
    Claim
    | Answered
    | Stored
    | Failed
    | Heartbeat
    | Lead
    | Follow
    | Join
    | Wait
    | Begin
    | Lost
    | Trained
    | Drain
    | StatusRequest
    | Trouble
)
"""Requests that the state machine answers."""
AnyRequest = PackRequest | Alive
AnyReply = Claims | Prompts | Beat | Led | Following | Packs | Go | Done | Refused | Report

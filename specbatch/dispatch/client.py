"""How components ask the dispatcher: one method per request, from any thread.

Every request is answered or raises. A request that gets no answer is sent again on a new connection until the
deadline: all requests may arrive twice (see `specbatch.dispatch.state`).
"""

from __future__ import annotations

from specbatch.dispatch.messages import Beat, Claims, Fault, Go, Packs, Report
from specbatch.dispatch.rendezvous import Rendezvous
from specbatch.errors import RunError
from specbatch.manifest import Manifest, PackId


class DispatcherGone(RunError):
    """The dispatcher did not answer within the deadline: the head is gone, or cut off from here."""


class RequestRefused(RunError):
    """The dispatcher says that the request made no sense: a defect of the sender, or a world that is over."""


class Client:
    """A connection to the dispatcher of one attempt.

    Args:
        deadline_s: after so long without an answer a request raises `DispatcherGone`.

    All methods raise `DispatcherGone` and `RequestRefused`.
    """

    def __init__(self, rendezvous: Rendezvous, *, deadline_s: float = 30.0) -> None:
        raise NotImplementedError

    def claim(self, engine: str, most: int) -> Claims:
        """Packs to compute, at most ``most``; returns after at most about `LONG_POLL_S`, possibly without any."""
        raise NotImplementedError

    def stored(self, engine: str, manifests: list[Manifest]) -> None:
        """Report what was put into the store. Claims that are no longer the engine's are ignored."""
        raise NotImplementedError

    def failed(self, engine: str, claim: int, why: str, fault: Fault = Fault.PACK) -> None:
        """Give a claim back that can't be computed."""
        raise NotImplementedError

    def heartbeat(self, engine: str, claims: list[int], state: str, tokens_per_s: float = 0.0) -> Beat:
        """Name every claim that is being worked on: those that are not named are given to others."""
        raise NotImplementedError

    def join(
        self, rank: int, world: int, segment: str, segment_bytes: int, step: int, generation: int = 0
    ) -> None:
        """Join the world of ranks after ``step`` trained steps."""
        raise NotImplementedError

    def wait(self, rank: int, packs: list[PackId]) -> Packs:
        """Those of ``packs`` that are stored or void; after at most about `LONG_POLL_S` possibly none."""
        raise NotImplementedError

    def begin(self, rank: int, step: int) -> Go:
        """Whether the step may be trained; after at most about `LONG_POLL_S` possibly not yet."""
        raise NotImplementedError

    def lost(self, rank: int, pack: PackId, claim: int, why: str) -> None:
        """What this claim's manifest names is not there, or not what it was: have it computed again."""
        raise NotImplementedError

    def trained(self, rank: int, step: int) -> None:
        """Report a step as trained, after its packs were removed from the store."""
        raise NotImplementedError

    def drain(self, why: str) -> None:
        """End the attempt at the next step's boundary."""
        raise NotImplementedError

    def status(self) -> Report:
        """The state of all, for people."""
        raise NotImplementedError

    def close(self) -> None:
        """Close all connections."""
        raise NotImplementedError

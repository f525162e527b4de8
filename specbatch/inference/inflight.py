"""Claims of an engine that are not settled yet. Pure: no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from specbatch.dispatch.messages import Granted
from specbatch.inference.capture_request import Captured
from specbatch.pack_manifest import Chunk, Manifest, PackId, missing


@dataclass
class _Claim:
    granted: Granted
    rows: list[tuple[int, str, int]]
    waiting: dict[int, int]
    """Number of tokens sent for each sample whose rows are not stored yet."""
    chunks: list[Chunk] = field(default_factory=list)


class InFlight:
    """The claims in flight of an engine.

    Args:
        widths: values per row of each tensor.
    """

    def __init__(self, widths: dict[str, int]) -> None:
        self.widths = widths
        self.tokens = 0
        """Tokens of all samples captured so far."""
        self._claims: dict[int, _Claim] = {}

    @property
    def claims(self) -> dict[int, PackId]:
        """Return the claims and their packs, in the order in which they were granted."""
        return {number: claim.granted.pack for number, claim in self._claims.items()}

    def begin(self, granted: Granted, rows: list[tuple[int, str, int]], tokens: dict[int, int]) -> None:
        """Record a claim.

        Args:
            rows: sample, tensor and number of rows that have to be stored.
            tokens: number of tokens sent for each sample with such rows.
        """
        self._claims[granted.claim] = _Claim(granted, rows, dict(tokens))

    def settle(self, result: Captured) -> Manifest | str | None:
        """Record captured rows.

        Returns: the manifest, once the whole claim is stored; a sentence, if the stored rows are not the requested
            ones; None while rows are missing, and for claims that are no longer in flight. A claim with a manifest or a
            sentence is no longer in flight.
        """
        claim = self._claims.get(result.claim)
        if claim is None:
            return None
        self.tokens += claim.waiting.pop(result.sample, 0)
        claim.chunks += result.chunks
        return None if claim.waiting else self.finish(result.claim)

    def finish(self, number: int) -> Manifest | str:
        """End a claim that waits for nothing; return the same as `settle`."""
        claim = self._claims.pop(number)
        manifest = Manifest(number, claim.granted.pack, tuple(claim.chunks))
        return missing(manifest, claim.rows, self.widths) or manifest

    def drop(self, number: int) -> bool:
        """Forget a claim; return false if it was not in flight."""
        return self._claims.pop(number, None) is not None

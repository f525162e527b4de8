"""What an engine has claimed and not yet answered for. Pure: no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from specbatch.dispatch.messages import Granted
from specbatch.inference.orders import Captured
from specbatch.manifest import Chunk, Manifest, PackId, missing


@dataclass
class _Claim:
    granted: Granted
    rows: list[tuple[int, str, int]]
    waiting: dict[int, int]
    """Tokens sent of each sample whose rows are not stored yet."""
    chunks: list[Chunk] = field(default_factory=list)


class Work:
    """Claims in flight.

    Args:
        widths: values a row of each tensor.
    """

    def __init__(self, widths: dict[str, int]) -> None:
        self.widths = widths
        self.tokens = 0
        """Tokens of all samples that were captured so far."""
        self._claims: dict[int, _Claim] = {}

    @property
    def claims(self) -> dict[int, PackId]:
        """The claims and their packs, in the order in which they were granted."""
        return {number: claim.granted.pack for number, claim in self._claims.items()}

    def begin(self, granted: Granted, rows: list[tuple[int, str, int]], tokens: dict[int, int]) -> None:
        """Note a claim.

        Args:
            rows: sample, tensor and number of rows that must be stored.
            tokens: how many are sent of each sample that has such rows.
        """
        self._claims[granted.claim] = _Claim(granted, rows, dict(tokens))

    def settle(self, result: Captured) -> Manifest | str | None:
        """Note what was captured.

        Returns:
            the manifest, once all of its claim is stored; a sentence, if what is stored is not what was asked for; None
            while something is missing, and for claims that are not in flight any more. A claim with a manifest or a
            sentence is no longer in flight.
        """
        claim = self._claims.get(result.claim)
        if claim is None:
            return None
        self.tokens += claim.waiting.pop(result.sample, 0)
        claim.chunks += result.chunks
        return None if claim.waiting else self.finish(result.claim)

    def finish(self, number: int) -> Manifest | str:
        """End a claim that waits for nothing; returns as `settle` does."""
        claim = self._claims.pop(number)
        manifest = Manifest(number, claim.granted.pack, tuple(claim.chunks))
        return missing(manifest, claim.rows, self.widths) or manifest

    def drop(self, number: int) -> bool:
        """Forget a claim; False if it was not in flight."""
        return self._claims.pop(number, None) is not None

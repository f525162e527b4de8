"""The summary of a preparation: as text for people, and stored with the prepared data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

HARMLESS = (
    "blank line",
    "left out by data.transform",
    "no answer that is to be learnt",
    "longer than max_tokens",
    "no loss token within max_tokens",
)
"""Reasons that are not defects of the data and don't count for ``data.max_bad_fraction``."""


@dataclass
class Skipped:
    """Samples that were skipped for one reason."""

    reason: str
    count: int
    first: str
    """File and line of the first one."""
    detail: str
    """Detail of that row."""

    def text(self) -> str:
        more = f", {self.detail}" if self.detail else ""
        return f"{self.count:,} {self.reason} (first: {self.first}{more})"


@dataclass
class SourcePart:
    """One file or one data set of the hub in a part."""

    name: str
    path: str
    """Directory of its samples."""
    entry: int
    """Index of the entry of ``data.train`` or ``data.heldout`` that it belongs to."""
    rows: int
    samples: int
    tokens: int
    loss_tokens: int


@dataclass
class Part:
    """The training or the held-out data, or one source of them."""

    path: str
    """Directory of the prepared data."""
    fingerprint: str
    """Fingerprint of the prepared data: equal if and only if all samples are."""
    rows: int = 0
    bad_rows: int = 0
    """Rows with anything that counts for ``data.max_bad_fraction``."""
    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    prompts: int = 0
    length_median: int = 0
    length_p95: int = 0
    length_max: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    """Reasons for skipped rows, the most frequent first."""
    warned: list[Skipped] = field(default_factory=list)
    """Warnings, with counts."""
    warnings: list[str] = field(default_factory=list)
    """Further warnings, for people."""
    sources: list[SourcePart] = field(default_factory=list)
    """The sources in order; empty for the part of a single source."""

    def text(self, title: str) -> str:
        """Lines for people."""
        share = 100 * self.loss_tokens / max(1, self.tokens)
        lines = [
            f"{title}: {self.samples:,} samples of {self.rows:,} rows, {self.tokens:,} tokens, "
            f"{self.loss_tokens:,} loss tokens ({share:.0f} %)"
        ]
        if self.samples:
            lengths = f"{self.length_median:,} median, {self.length_p95:,} p95, {self.length_max:,} max"
            lines.append(
                f"  tokens per sample: {lengths}" + (f"; {self.truncated:,} truncated" if self.truncated else "")
            )
        if self.prompts:
            lines.append(f"  prompts for the evaluation: {self.prompts:,}")
        lines += [f"  skipped: {item.text()}" for item in self.skipped]
        warnings = [f"{item.reason} ({item.count:,} times, first: {item.first})" for item in self.warned]
        lines += [f"  warning: {warning}" for warning in (*warnings, *self.warnings)]
        return "\n".join(lines)


@dataclass
class Summary:
    """All prepared data of a configuration."""

    train: Part
    heldout: Part | None
    tokenizer_size: int
    """Ids that the tokenizer can produce, from 0."""
    seconds: float = 0.0
    cached: bool = False
    """Whether nothing had to be prepared."""
    shared: int = 0
    """Number of held-out samples that equal a training sample."""
    first_shared: str = ""
    """File and row of the first of them."""

    def text(self) -> str:
        """Lines for people."""
        lines = [self.train.text("training data")]
        if self.heldout:
            lines.append(self.heldout.text("held-out data"))
        if self.shared and self.heldout:
            lines.append(
                f"  warning: {self.shared:,} of {self.heldout.samples:,} held-out samples equal a training sample, "
                f"so the draft is evaluated on its training data (first: {self.first_shared})"
            )
        lines.append(
            f"prepared before, in {Path(self.train.path).parent}"
            if self.cached
            else f"prepared in {self.seconds:.1f} s"
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Summary:
        heldout = part_from_json(value["heldout"]) if value["heldout"] else None
        return Summary(**{**value, "train": part_from_json(value["train"]), "heldout": heldout})


def part_from_json(value: dict[str, Any]) -> Part:
    """Return the part that `dataclasses.asdict` converted."""
    lists = {"skipped": Skipped, "warned": Skipped, "sources": SourcePart}
    return Part(**{**value, **{name: [kind(**item) for item in value.get(name, ())] for name, kind in lists.items()}})


def joined(parts: list[Part], sources: list[SourcePart], path: Path) -> Part:
    """Return the part that consists of the given sources: totals, and reasons and warnings, most frequent first.

    Args:
        sources: the entry of each in the summary.
        path: directory of the part.
    """
    whole = Part(str(path), "", sources=sources)
    names = ("rows", "bad_rows", "samples", "tokens", "loss_tokens", "truncated", "prompts")
    for name in names:
        setattr(whole, name, sum(getattr(part, name) for part in parts))
    for name in ("skipped", "warned"):
        found: dict[str, Skipped] = {}
        for item in (item for part in parts for item in getattr(part, name)):
            found.setdefault(item.reason, replace(item, count=0)).count += item.count
        setattr(whole, name, sorted(found.values(), key=lambda item: -item.count))
    prints = [part.fingerprint for part in parts]
    whole.fingerprint = prints[0] if len(prints) == 1 else xxhash.xxh3_128_hexdigest(" ".join(prints).encode())
    return whole

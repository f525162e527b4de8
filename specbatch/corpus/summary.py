"""What came of a preparation: for people as text, and kept with the prepared data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HARMLESS = ("blank line", "longer than max_tokens", "no loss token within max_tokens")
"""Reasons that are no fault of the data: they don't count for ``data.max_bad_fraction``."""


@dataclass
class Skipped:
    """Samples that there are not, for one reason."""

    reason: str
    count: int
    first: str
    """File and line of the first one."""
    detail: str
    """What there is to say of that one."""

    def text(self) -> str:
        more = f", {self.detail}" if self.detail else ""
        return f"{self.count:,} {self.reason} (first: {self.first}{more})"


@dataclass
class Part:
    """The training or the held-out data."""

    path: str
    """Directory of the prepared data."""
    fingerprint: str
    """Of the prepared data: equal exactly if all samples are."""
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
    """By falling count."""
    warnings: list[str] = field(default_factory=list)

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
                f"  tokens a sample: {lengths}" + (f"; {self.truncated:,} truncated" if self.truncated else "")
            )
        if self.prompts:
            lines.append(f"  prompts for the evaluation: {self.prompts:,}")
        lines += [f"  skipped: {item.text()}" for item in self.skipped]
        lines += [f"  warning: {warning}" for warning in self.warnings]
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

    def text(self) -> str:
        """Lines for people."""
        lines = [self.train.text("training data")]
        if self.heldout:
            lines.append(self.heldout.text("held-out data"))
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
    """The part that `dataclasses.asdict` wrote out."""
    return Part(**{**value, "skipped": [Skipped(**item) for item in value["skipped"]]})

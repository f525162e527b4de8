"""Writes the converted rows of one source, in order, and counts reasons and warnings."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from specbatch.corpus.samples import Converted
from specbatch.corpus.stored import SampleAppender
from specbatch.corpus.summary import HARMLESS, Part, Skipped, part_from_json
from specbatch.rundir import read_json, write_json

PROGRESS = "progress.json"
"""File with the progress of an unfinished part, from which it is continued."""


class PartWriter:
    """Writes the samples as they come, and the rest in `finish`, or when the context is left without an error.

    Args:
        folder: an existing directory, empty or with the state of an earlier writer of the same rows at its last `keep`.
        tokenizer_size: ids that the tokenizer can produce, from 0.
    """

    def __init__(self, folder: Path, tokenizer_size: int) -> None:
        self.folder = folder
        state: dict[str, Any] = read_json(folder / PROGRESS) or {}
        self.part = part_from_json(state["part"]) if state else Part(path=str(folder), fingerprint="")
        self._samples = SampleAppender(folder, tokenizer_size, state.get("sizes"))
        self._digest = int(state.get("digest", "0"), 16)
        self._skipped = {item["reason"]: Skipped(**item) for item in state.get("skipped", ())}
        self._warnings = Counter(dict(state.get("warnings", ())))
        self._first: dict[str, str] = dict(state.get("first", ()))

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        self.close()

    def add(self, batch: list[Converted]) -> None:
        """Write the samples of some rows."""
        part = self.part
        for row in batch:
            part.rows += 1
            part.truncated += row.truncated
            part.bad_rows += any(reason not in HARMLESS for reason, _ in row.rejected)
            for reason, detail in row.rejected:
                self._skipped.setdefault(reason, Skipped(reason, 0, row.place, detail)).count += 1
            for warning in row.warnings:
                self._warnings[warning] += 1
                self._first.setdefault(warning, row.place)
            if row.prompt is not None:
                part.prompts += 1
                self._samples.add_prompt(row.prompt)
            number = int(row.place.rpartition(":")[2])
            for index, (ids, mask) in enumerate(row.samples):
                digest, spans = self._samples.add(ids, mask, number, row.images.get(index, ()))
                # One hash over all samples, which depends on each of them and on their order.
                chained = self._digest.to_bytes(16, "little") + digest.to_bytes(8, "little")
                self._digest = xxhash.xxh3_128_intdigest(chained + len(ids).to_bytes(8, "little") + spans.tobytes())
                part.samples += 1
                part.tokens += len(ids)
                part.loss_tokens += int((spans[:, 1] - spans[:, 0]).sum())

    def keep(self) -> None:
        """Save the progress, so that another writer can continue from here."""
        sizes = self._samples.flush()
        state = {
            "sizes": sizes,
            "part": asdict(self.part),
            "digest": f"{self._digest:032x}",
            "skipped": [asdict(item) for item in self._skipped.values()],
            "warnings": dict(self._warnings),
            "first": self._first,
        }
        write_json(self.folder / PROGRESS, state)

    def close(self) -> None:
        """Close the files; anything after the last `keep` is lost."""
        self._samples.close()

    def finish(self) -> None:
        """Write the rest, so that the part is complete."""
        self._samples.finish()
        part = self.part
        part.fingerprint = f"{self._digest:032x}"
        part.skipped = list(self._skipped.values())
        part.warned = [Skipped(text, count, self._first[text], "") for text, count in self._warnings.items()]
        (self.folder / PROGRESS).unlink(missing_ok=True)

"""Write converted rows, in their order, and count what there is to tell of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import xxhash

from specbatch.corpus.samples import Converted
from specbatch.corpus.summary import HARMLESS, Part, Skipped

_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_())), ("place", pa.string())])


class PartWriter:
    """Writes the samples as they come, the rest when it is left without an error.

    Args:
        folder: exists and is empty.
        tokenizer_size: ids that the tokenizer can produce, from 0.
    """

    def __init__(self, folder: Path, tokenizer_size: int) -> None:
        self.folder = folder
        self.part = Part(path=str(folder), fingerprint="")
        self._stage = folder / "stage.arrow"
        self._file = pa.ipc.new_stream(str(self._stage), _SCHEMA)
        self._counts = np.zeros(tokenizer_size, dtype=np.int64)
        self._digest = xxhash.xxh3_128()
        self._lengths: list[np.ndarray] = []
        self._prompts: list[np.ndarray] = []
        self._skipped: dict[str, Skipped] = {}
        self._warnings: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._seen: set[int] = set()
        self._repeated, self._first_repeated = 0, ""

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._finish()

    def add(self, batch: list[Converted]) -> None:
        """Write the samples of some rows."""
        part = self.part
        ids: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        places: list[str] = []
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
                self._prompts.append(row.prompt)
            for sample_ids, mask in row.samples:
                ids.append(sample_ids)
                masks.append(mask)
                places.append(row.place)
                self._note_repetition(sample_ids, row.place)
        if not ids:
            return
        lengths = np.array([len(i) for i in ids], dtype=np.int64)
        all_ids, all_masks = np.concatenate(ids), np.concatenate(masks)
        self._lengths.append(lengths)
        self._counts += np.bincount(all_ids[all_masks], minlength=self._counts.size)
        for data in (lengths, all_ids, all_masks):
            self._digest.update(np.ascontiguousarray(data).tobytes())
        part.samples += len(ids)
        part.tokens += all_ids.size
        part.loss_tokens += int(all_masks.sum())
        ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        columns = [
            pa.ListArray.from_arrays(ends, pa.array(all_ids)),
            pa.ListArray.from_arrays(ends, pa.array(all_masks)),
            pa.array(places, pa.string()),
        ]
        self._file.write_batch(pa.record_batch(columns, schema=_SCHEMA))

    def _note_repetition(self, ids: np.ndarray, place: str) -> None:
        value = xxhash.xxh3_64_intdigest(ids.tobytes())
        if value in self._seen:
            self._repeated += 1
            self._first_repeated = self._first_repeated or place
        self._seen.add(value)

    def _finish(self) -> None:
        import datasets

        part = self.part
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, dtype=np.int64)
        np.save(self.folder / "lengths.npy", lengths)
        np.save(self.folder / "loss_token_counts.npy", self._counts)
        if self._prompts:
            ends = np.cumsum([len(p) for p in self._prompts])
            np.savez(self.folder / "prompts.npz", ids=np.concatenate(self._prompts), ends=ends)
        if part.samples:
            datasets.disable_progress_bars()
            datasets.Dataset.from_file(str(self._stage)).save_to_disk(str(self.folder / "samples"))
            part.length_median = int(np.median(lengths))
            part.length_p95 = int(np.percentile(lengths, 95))
            part.length_max = int(lengths.max())
        self._stage.unlink()
        part.prompts = len(self._prompts)
        part.fingerprint = self._digest.hexdigest()
        part.skipped = sorted(self._skipped.values(), key=lambda item: -item.count)
        part.warnings = [
            f"{text} ({count:,} rows, first: {self._first[text]})" for text, count in self._warnings.items()
        ]
        if self._repeated:
            part.warnings.append(
                f"{self._repeated:,} samples repeat an earlier one (first: {self._first_repeated}); kept"
            )

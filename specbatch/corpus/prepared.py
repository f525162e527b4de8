"""Reads prepared data, in every process of a run: memory mapped, loaded only when accessed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from specbatch.corpus.images import Image
from specbatch.corpus.stored import COUNTS, StoredSamples
from specbatch.corpus.summary import Part, Summary
from specbatch.drafts.masks import Masks, Runs, SampleId
from specbatch.errors import RunError
from specbatch.plan import HELD_OUT
from specbatch.rundir import RunDir, read_json, write_json

KEPT = "kept.npy"
"""File in the directory of a part from which samples are left out: int64, indices of the remaining ones over all
sources."""
SPANS_AT_ONCE, TOKENS_AT_ONCE = 1 << 16, 1 << 22
"""Most spans and tokens of masks that are processed together: algorithms work with spans, or expand all tokens."""


@dataclass(frozen=True)
class Sample:
    """One tokenized conversation."""

    input_ids: np.ndarray
    """int32 ``[tokens]``."""
    loss_mask: np.ndarray
    """bool ``[tokens]``."""
    images: tuple[Image, ...] = ()


class Corpus:
    """The samples of the training data, or of the held-out data, in the order of their rows.

    Args:
        part: the prepared part.
        tokenizer_size: ids that the tokenizer can produce, from 0.
        heldout: the held-out data of training data.

    Raises:
        RunError: the prepared data no longer exists.
    """

    def __init__(self, part: Part, tokenizer_size: int, heldout: Corpus | None = None) -> None:
        self.part, self.tokenizer_size, self.heldout = part, tokenizer_size, heldout
        self.path = Path(part.path)
        self._sources = [StoredSamples(Path(source.path)) for source in part.sources]
        for folder in (self.path, *(source.folder for source in self._sources)):
            if not (folder / "part.json").is_file():
                raise RunError(f"{folder}: the prepared data no longer exists; resume the run to prepare it again")
        if not self._sources:
            raise RunError(f"{self.path}: prepared by an older specbatch; resume the run to prepare the data again")
        self._firsts = [0, *accumulate(source.samples for source in part.sources)]

    def __len__(self) -> int:
        return self.part.samples

    @property
    def fingerprint(self) -> str:
        """Hash that is equal if and only if all samples are."""
        return self.part.fingerprint

    @cached_property
    def _kept(self) -> np.ndarray | None:
        """If samples are left out, the index of each remaining one among all: int64 ``[samples]``; else None."""
        path = self.path / KEPT
        return np.load(path, mmap_mode="r") if path.is_file() else None

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 ``[samples]``: tokens of each sample."""
        every = np.concatenate([np.diff(source.ends, prepend=0) for source in self._sources])
        return every if self._kept is None else every[self._kept]

    @cached_property
    def loss_token_counts(self) -> np.ndarray:
        """How often each id is a loss token: int64 ``[tokenizer_size]``."""
        return np.load(self.path / COUNTS)

    @property
    def hashes(self) -> np.ndarray:
        """Hash of each sample, uint64 ``[samples]``: equal samples have equal hashes."""
        every = np.concatenate([source.hashes for source in self._sources])
        return every if self._kept is None else every[self._kept]

    @property
    def entry_sizes(self) -> list[int]:
        """Number of samples of each entry of ``data.train``."""
        ends = np.array(self._firsts[1:])
        sizes = np.diff(ends if self._kept is None else np.searchsorted(self._kept, ends), prepend=0)
        found = [0] * (max(source.entry for source in self.part.sources) + 1)
        for source, size in zip(self.part.sources, sizes.tolist(), strict=True):
            found[source.entry] += size
        return found

    def sample(self, i: int) -> Sample:
        """Return the tokens, the loss mask and the images of a sample.

        Args:
            i: from 0; negative values are refused. Held-out samples follow the training samples.

        Raises:
            IndexError: there is no such sample.
        """
        source, _, place = self._find(i)
        return Sample(source.tokens(place), source.mask(place), source.images(place))

    def image_folders(self) -> set[Path]:
        """Return the directories of all images that are files, those of the held-out data included."""
        held = self.heldout.image_folders() if self.heldout is not None else set()
        return held.union(*(source.image_folders() for source in self._sources))

    def place(self, i: int) -> str:
        """Return the file and line of a sample."""
        source, name, place = self._find(i)
        return f"{name}:{source.rows[place]}"

    def first_with(self, token: int) -> int | None:
        """Return the first sample with a token, held-out samples after those of training; None if there is none."""
        for source, first in zip(self._sources, self._firsts, strict=False):
            ids, ends = source.ids, source.ends
            for begin in range(0, len(ids), TOKENS_AT_ONCE):
                for found in np.flatnonzero(ids[begin : begin + TOKENS_AT_ONCE] == token).tolist():
                    place = first + int(np.searchsorted(ends, begin + found, side="right"))
                    if self._kept is None:
                        return place
                    at = int(np.searchsorted(self._kept, place))
                    if at < len(self._kept) and self._kept[at] == place:
                        return at
        held = None if self.heldout is None else self.heldout.first_with(token)
        return None if held is None else len(self) + held

    def masks(self, *, heldout: bool = False) -> Iterator[Masks]:
        """Yield the loss masks of all samples in order, some samples at a time.

        Args:
            heldout: also yield those of the held-out data, last.
        """
        yield from self._masks(SampleId(0, 0))
        if heldout and self.heldout is not None:
            yield from self.heldout._masks(SampleId(HELD_OUT, len(self)))

    def _masks(self, begin: SampleId) -> Iterator[Masks]:
        kept, done = self._kept, 0
        for source, first in zip(self._sources, self._firsts, strict=False):
            ends, at = source.span_ends, 0
            while at < len(ends):
                token, span = (int(found[at - 1]) if at else 0 for found in (source.ends, ends))
                few = [
                    int(np.searchsorted(found, before + most, side="right"))
                    for found, before, most in ((source.ends, token, TOKENS_AT_ONCE), (ends, span, SPANS_AT_ONCE))
                ]
                after = max(at + 1, min(few))
                lengths_S = np.diff(source.ends[at:after], prepend=token)
                spans, ends_S = source.spans[span : ends[after - 1]].astype(np.int64), ends[at:after] - span
                if kept is not None:
                    there = slice(*np.searchsorted(kept, [first + at, first + after]))
                    lengths_S, spans, ends_S = _chosen(lengths_S, spans, ends_S, kept[there] - (first + at))
                if len(lengths_S):
                    where = SampleId(begin.epoch, begin.sample + done)
                    yield Masks(Runs(spans[:, 0], spans[:, 1], ends_S), lengths_S, first=where)
                done += len(lengths_S)
                at = after

    def prompts(self) -> list[list[int]]:
        """Token ids of each conversation up to and including the generation prompt of its first assistant turn.

        Only held-out data have any.
        """
        return [prompt for source in self._sources for prompt in source.prompts()]

    def _find(self, i: int) -> tuple[StoredSamples, str, int]:
        """Return the source that has a sample, its name, and the sample's index in it."""
        if self.heldout is not None and i >= len(self):
            return self.heldout._find(i - len(self))
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is not in 0..{len(self) - 1}")
        place = i if self._kept is None else int(self._kept[i])
        at = bisect_right(self._firsts, place) - 1
        return self._sources[at], self.part.sources[at].name, place - self._firsts[at]


def _chosen(
    lengths_S: np.ndarray, spans: np.ndarray, ends_S: np.ndarray, samples: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lengths, spans and ends of the spans for some of the samples."""
    counts_S = np.diff(ends_S, prepend=0)
    chosen_S = np.zeros(len(counts_S), dtype=bool)
    chosen_S[samples] = True
    return lengths_S[samples], spans[np.repeat(chosen_S, counts_S)], np.cumsum(counts_S[samples])


def attach(run_dir: RunDir, summary: Summary) -> None:
    """Record in the run directory which prepared data the run uses."""
    write_json(run_dir.corpus, summary.as_json())


def corpus_of(summary: Summary) -> Corpus:
    """Return the prepared data of a summary."""
    heldout = Corpus(summary.heldout, summary.tokenizer_size) if summary.heldout else None
    return Corpus(summary.train, summary.tokenizer_size, heldout)


def open_corpus(run_dir: RunDir) -> Corpus:
    """Return the prepared data of a run; with ``heldout`` if it has any.

    Raises:
        RunError: nothing is prepared, or the prepared data is gone.
    """
    value = read_json(run_dir.corpus)
    if value is None:
        raise RunError(f"{run_dir.corpus}: missing; the run was never prepared")
    return corpus_of(Summary.from_json(value))

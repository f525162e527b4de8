"""Prepared data as every process of a run reads them: memory mapped, nothing else is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from specbatch.corpus.summary import Part, Summary
from specbatch.errors import RunError
from specbatch.rundir import RunDir, read_json, write_json


@dataclass(frozen=True)
class Sample:
    """One tokenized conversation."""

    input_ids: np.ndarray
    """int32 ``[tokens]``."""
    loss_mask: np.ndarray
    """bool ``[tokens]``."""


class Corpus:
    """The samples of the training data, or of the held-out data, in the order of their rows.

    Args:
        part: what was prepared.
        tokenizer_size: ids that the tokenizer can produce, from 0.
        heldout: the held-out data that belong to training data.

    Raises:
        RunError: if the prepared data are no longer there.
    """

    def __init__(self, part: Part, tokenizer_size: int, heldout: Corpus | None = None) -> None:
        self.part, self.tokenizer_size, self.heldout = part, tokenizer_size, heldout
        self.path = Path(part.path)
        if not (self.path / "part.json").is_file():
            raise RunError(f"{self.path}: the prepared data are no longer there; resume the run to prepare them again")

    def __len__(self) -> int:
        return self.part.samples

    @property
    def fingerprint(self) -> str:
        """Equal exactly if all samples are."""
        return self.part.fingerprint

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 ``[samples]``: tokens of each sample."""
        return np.load(self.path / "lengths.npy")

    @cached_property
    def loss_token_counts(self) -> np.ndarray:
        """int64 ``[tokenizer_size]``: how often each id is a loss token."""
        return np.load(self.path / "loss_token_counts.npy")

    def sample(self, i: int) -> Sample:
        """The tokens and the loss mask of a sample.

        Args:
            i: from 0; a negative one is refused. The samples of the held-out data follow one's own.

        Raises:
            IndexError: if there is no such sample.
        """
        ids, mask = (self._row(i).column(name).chunk(0).flatten() for name in ("input_ids", "loss_mask"))
        return Sample(ids.to_numpy().copy(), mask.to_numpy(zero_copy_only=False))

    def loss_masks(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The loss masks of samples one after the other, bool ``[tokens of all]``, and their lengths, int64 ``[S]``.

        Args:
            first: of the training data, or of the held-out data where these are theirs; ``end`` is the one after.
        """
        column = self._samples[first:end].column("loss_mask").combine_chunks()
        return column.flatten().to_numpy(zero_copy_only=False), self.lengths[first:end]

    def place(self, i: int) -> str:
        """File and line that a sample comes from."""
        return str(self._row(i).column("place")[0])

    def prompts(self) -> list[list[int]]:
        """Token ids of each conversation up to and with the generation prompt of its first assistant turn.

        Only held-out data have any.
        """
        path = self.path / "prompts.npz"
        if not path.is_file():
            return []
        with np.load(path) as file:
            return [ids.tolist() for ids in np.split(file["ids"], file["ends"][:-1])] if file["ends"].size else []

    def _row(self, i: int) -> Any:
        """Arrow table of one row."""
        if self.heldout is not None and i >= len(self):
            return self.heldout._row(i - len(self))
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is not in 0..{len(self) - 1}")
        return self._samples[i]

    @cached_property
    def _samples(self) -> Any:
        import datasets

        return datasets.load_from_disk(str(self.path / "samples"), keep_in_memory=False).with_format("arrow")


def attach(run_dir: RunDir, summary: Summary) -> None:
    """Write into the run directory which prepared data the run uses."""
    write_json(run_dir.corpus, summary.as_json())


def corpus_of(summary: Summary) -> Corpus:
    """The prepared data that a summary tells of."""
    heldout = Corpus(summary.heldout, summary.tokenizer_size) if summary.heldout else None
    return Corpus(summary.train, summary.tokenizer_size, heldout)


def open_corpus(run_dir: RunDir) -> Corpus:
    """The prepared data of a run; with ``heldout`` where it has any.

    Raises:
        RunError: if nothing is prepared, or the prepared data are gone.
    """
    value = read_json(run_dir.corpus)
    if value is None:
        raise RunError(f"{run_dir.corpus}: missing; the run was never prepared")
    return corpus_of(Summary.from_json(value))

"""From rendered text to tokens, with the positions of characters among them.

A position in the text is mapped to a position in the tokens only if a boundary between two tokens is exactly there.
There are three ways to find boundaries. The dearest ones are used only where the others do not apply:

- the bytes that tokens stand for, one token after the other, make up the text: then their lengths tell where each ends;
- the library's offsets, which cost as much again as a third of the tokenizer, and memory for a copy of it;
- tokens of parts of the text, for tokenizers that are written in Python.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from specbatch.corpus.conversation import Rejected

Span = tuple[int, int]
"""First position and the one after the last."""
Cut = tuple[int, int | None]
"""The first token that begins in a span, and how many end in it or before; None if one is across its end."""
Asked = tuple[str, Sequence[Span]]
"""Text to encode, and ranges of its characters, in order and without overlap."""
Encoded = tuple[np.ndarray, np.ndarray]
"""Ids, int32 ``[tokens]``, and which of them are in the spans, bool ``[tokens]``."""

_LONGEST_TOKEN = 64
"""Characters around an edge within which a token across it is looked for."""
_PATIENCE = 8
"""Texts in a row that are not made up by their tokens' bytes after which that is no longer tried."""


class Encoder:
    """Encodes text with a tokenizer.

    Args:
        tokenizer: of transformers.
        added: the tokens that were added to its vocabulary.
    """

    def __init__(self, tokenizer: Any, added: Sequence[str]) -> None:
        self.tokenizer, self._added = tokenizer, added
        self._failures = 0
        # Work is divided among processes and not among threads, which would take other people's cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if tokenizer.is_fast:
            # As transformers itself does before it encodes a text that is not to be cut.
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()

    def encode(self, text: str, spans: Sequence[Span] = ()) -> Encoded:
        """Return the tokens of rendered text.

        A token across the beginning of a span is not part of it: the target is given the part of that token before the
        span, so it does not write this token.

        Raises:
            Rejected: if a span ends inside a token.
        """
        (found,) = self.encode_all([(text, spans)])
        if isinstance(found, Rejected):
            raise found
        return found

    def encode_all(self, asked: Sequence[Asked]) -> list[Encoded | Rejected]:
        """Encode several texts at once, which is faster; a text that can't be encoded gives its `Rejected`."""
        if not self.tokenizer.is_fast:
            return [self._in_python(text, spans) for text, spans in asked]
        if self._failures >= _PATIENCE:
            return [self._aligned(text, spans) for text, spans in asked]
        backend = self.tokenizer.backend_tokenizer
        encodings = backend.encode_batch_fast([text for text, _ in asked], add_special_tokens=False)
        return [
            self._measured(text, spans, encoding.ids) for (text, spans), encoding in zip(asked, encodings, strict=True)
        ]

    def plain(self, text: str) -> np.ndarray:
        """Return the ids of text without a template, int32 ``[tokens]``, with the tokenizer's own special tokens."""
        return np.asarray(self.tokenizer(text)["input_ids"], dtype=np.int32)

    # Texts that are encoded in two parts.

    def seams(self, text: str) -> list[Span]:
        """Return tokens of a text before which it can be divided: its tokens are those of the two parts. They were
        added to the vocabulary, and are taken out of a text before anything else is looked for."""
        return [match.span() for match in self._separator.finditer(text) if match[0] in self._dividing]

    @cached_property
    def _taken_out(self) -> list[Any]:
        """The added tokens that are looked for in the text as it is."""
        if not self.tokenizer.is_fast:
            return []
        return [token for token in self.tokenizer.added_tokens_decoder.values() if not token.normalized]

    @cached_property
    def _dividing(self) -> frozenset[str]:
        """The added tokens that take nothing of the text before them."""
        if any(token.single_word for token in self._taken_out):
            return frozenset()
        return frozenset(t.content for t in self._taken_out if not t.lstrip and t.content.strip() == t.content)

    @cached_property
    def _greedy(self) -> list[int]:
        """Ids of the added tokens that take in the white space after them."""
        tokens = self.tokenizer.added_tokens_decoder.items()
        return [i for i, token in tokens if token.rstrip and token.content.rstrip() == token.content]

    @cached_property
    def _separator(self) -> re.Pattern[str]:
        tokens = sorted((token.content for token in self._taken_out), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    # By the bytes of each token.

    @cached_property
    def _bytes(self) -> np.ndarray:
        """Probable bytes of each id, objects ``[ids]``. `_measured` checks them for each text."""
        backend = self.tokenizer.backend_tokenizer
        of_bytes = b"ByteLevel" in (backend.decoder.__getstate__() if backend.decoder else b"")
        vocabulary = backend.get_vocab(with_added_tokens=True)
        found = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, i in vocabulary.items():
            found[i] = _of_byte_level(token) if of_bytes else _of_sentencepiece(token)
        for token in self._added:
            if token in vocabulary:
                found[vocabulary[token]] = token.encode()
        return np.array(found, dtype=object)

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Number of bytes of each id, int64 ``[ids]``."""
        return np.array([len(piece) for piece in self._bytes], dtype=np.int64)

    def _measured(self, text: str, spans: Sequence[Span], found: list[int]) -> Encoded | Rejected:
        """Find spans by the bytes of the tokens if these make up the text, else by offsets."""
        ids, data = np.fromiter(found, np.int32, len(found)), text.encode()
        if not spans:
            return ids, np.zeros(len(ids), dtype=bool)
        if b"".join(self._bytes[ids].tolist()) != data:
            self._failures += 1
            return self._aligned(text, spans)
        self._failures = 0
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        edges = [position for span in spans for position in span]
        if len(data) != len(text):
            edges = list(accumulate(len(text[a:b].encode()) for a, b in pairwise([0, *edges])))
        return _masked(text, spans, ids, _cut(ends - lengths, ends, edges[::2], edges[1::2]))

    # By offsets.

    @cached_property
    def _with_offsets(self) -> Any:
        """The tokenizer without its post-processor, which would take spaces out of the offsets; nothing else of that
        is needed here."""
        found = copy.deepcopy(self.tokenizer.backend_tokenizer)
        found.post_processor = None
        return found

    def _aligned(self, text: str, spans: Sequence[Span]) -> Encoded | Rejected:
        """Find spans by the library's offsets."""
        encoding = self._with_offsets.encode(text, add_special_tokens=False)
        ids, pairs = np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        starts = np.minimum.accumulate(pairs[::-1, 0])[::-1]
        """Leftmost start of any token from here on; tokens of the bytes of one character all have its offsets."""
        # An added token may take in the white space after it (`rstrip`), which is not what it stands for.
        for place in np.flatnonzero(np.isin(ids, self._greedy)).tolist():
            start, end = pairs[place].tolist()
            pairs[place, 1] = start + len(text[start:end].rstrip())
        ends = np.maximum.accumulate(pairs[:, 1])
        return _masked(text, spans, ids, _cut(starts, ends, [start for start, _ in spans], [end for _, end in spans]))

    # By parts of the text.

    def _in_python(self, text: str, spans: Sequence[Span]) -> Encoded | Rejected:
        ids = self._ids(text)
        return _masked(text, spans, np.array(ids, dtype=np.int32), self._by_parts(text, ids, spans))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _by_parts(self, text: str, ids: list[int], spans: Sequence[Span]) -> list[Cut]:
        edges = [0, *(position for span in spans for position in span), len(text)]
        pieces = [self._ids(text[a:b]) for a, b in pairwise(edges)]
        if [token for piece in pieces for token in piece] == ids:
            ends = list(accumulate(map(len, pieces)))[:-1]
            return list(zip(ends[::2], ends[1::2], strict=True))
        # A token may be across an edge: an edge exists only if the tokens up to it are the first tokens of the whole.
        cuts: list[Cut] = []
        for start, end in spans:
            later = (self._whole(text, ids, p) for p in range(start, min(end, start + _LONGEST_TOKEN) + 1))
            last = self._whole(text, ids, end)
            cuts.append((next((cut for cut in later if cut is not None), last or 0), last))
        return cuts

    def _whole(self, text: str, ids: list[int], position: int) -> int | None:
        """Number of tokens of the text up to a position; None if they are not the first tokens of the whole text."""
        prefix = self._ids(text[:position])
        return len(prefix) if ids[: len(prefix)] == prefix else None


def _masked(text: str, spans: Sequence[Span], ids: np.ndarray, cuts: list[Cut]) -> Encoded | Rejected:
    """Ids and mask; instead of them why there are none, if a token is across the end of a span."""
    mask = np.zeros(len(ids), dtype=bool)
    for (_, end), (first, last) in zip(spans, cuts, strict=True):
        if last is None:
            around = text[max(0, end - 12) : end] + "|" + text[end : end + 12]
            return Rejected("mask not provable", f"a token lies across the end of an answer: {around!r}")
        mask[first:last] = True
    return ids, mask


def _cut(starts: np.ndarray, ends: np.ndarray, begun: list[int], done: list[int]) -> list[Cut]:
    """Where spans are among tokens, of which none begins or ends before an earlier one.

    Args:
        begun: where the spans begin.
        done: where they end.
    """
    firsts, lasts = np.searchsorted(starts, begun, side="left"), np.searchsorted(ends, done, side="right")
    return [
        (first, last if last == len(starts) or starts[last] >= end else None)
        for first, last, end in zip(firsts.tolist(), lasts.tolist(), done, strict=True)
    ]


def _byte_signs() -> dict[str, int]:
    """The byte for which each sign of a byte-level vocabulary stands: printable ones for themselves, the others for
    signs from U+0100 on, in order."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_signs()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _of_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTES[sign] for sign in token])
    except KeyError:
        return b""  # no sequence of bytes; no text is made up of it


def _of_sentencepiece(token: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace("\u2581", " ").encode()

"""Reads the token ids that a tokenizer can produce from its files, without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from specbatch.errors import UserError

Ids = dict[int, str]


def tokenizer_ids(folder: Path) -> Ids:
    """Return ids and tokens of a tokenizer, including added ones; empty if no file has them.

    The vocabulary comes from the first file of `VOCABULARIES` that exists, and added tokens are read wherever
    tokenizers keep them: in ``tokenizer.json``, ``added_tokens.json`` and ``tokenizer_config.json``.

    Raises:
        UserError: a file can't be read.
    """
    ids: Ids = {}
    vocabulary = [(name, read) for name, read in VOCABULARIES.items() if (folder / name).is_file()][:1]
    for name, read in (*vocabulary, *ADDED.items()):
        path = folder / name
        if not path.is_file():
            continue
        try:
            ids.update(read(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path}: not a tokenizer file ({error}); download it again") from error
    return ids


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _whole(path: Path) -> Ids:
    """Read ``tokenizer.json`` of the library `tokenizers`."""
    content = _json(path)
    vocabulary = content["model"].get("vocab", {})
    # Unigram models list their pieces with scores.
    ids = (
        {int(i): token for token, i in vocabulary.items()}
        if isinstance(vocabulary, dict)
        else {i: piece[0] for i, piece in enumerate(vocabulary)}
    )
    return ids | {int(entry["id"]): entry["content"] for entry in content.get("added_tokens") or []}


def _by_token(path: Path) -> Ids:
    """Read ``vocab.json`` or ``added_tokens.json``: tokens and their ids."""
    return {int(i): token for token, i in _json(path).items()}


def _by_line(path: Path) -> Ids:
    return dict(enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n")))


def _tiktoken(path: Path) -> Ids:
    """Read lines with a token in base64 and its id."""
    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines() if line.strip())
    return {int(i): token for token, i in pairs}


def _sentencepiece(path: Path) -> Ids:
    """Read the pieces of a sentencepiece model, a protobuf: field 1 of ``ModelProto``, whose field 1 is the text."""
    try:
        pieces = [value for field, value in _fields(path.read_bytes()) if field == 1 and isinstance(value, bytes)]
    except (ValueError, IndexError):
        return {}  # other libraries use the name too
    texts = (next((value for field, value in _fields(piece) if field == 1), b"") for piece in pieces)
    return {i: text.decode(errors="replace") if isinstance(text, bytes) else "" for i, text in enumerate(texts)}


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield numbers and values of the fields of a protobuf message.

    Raises:
        ValueError: the data is not one.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if not data[at - 1] & 0x80:
                return value

    while at < len(data):
        key = varint()
        match key & 7:
            case 0:
                yield key >> 3, varint()
                continue
            case 2:
                length = varint()
            case 1 | 5 as width:
                length = 8 if width == 1 else 4
            case kind:
                raise ValueError(f"not a protobuf: wire type {kind}")
        if at + length > len(data):
            raise ValueError("it ends too early")
        yield key >> 3, data[at : at + length]
        at += length


def _decoder(path: Path) -> Ids:
    """Read ``added_tokens_decoder`` of ``tokenizer_config.json``."""
    return {int(i): entry["content"] for i, entry in (_json(path).get("added_tokens_decoder") or {}).items()}


VOCABULARIES: dict[str, Callable[[Path], Ids]] = {
    "tokenizer.json": _whole,
    "vocab.json": _by_token,
    "vocab.txt": _by_line,
    "tokenizer.model": _sentencepiece,
    "spiece.model": _sentencepiece,
    "sentencepiece.bpe.model": _sentencepiece,
    "tiktoken.model": _tiktoken,
    "qwen.tiktoken": _tiktoken,
}
"""Files with all tokens except added ones, and their readers; the file that transformers prefers comes first."""
ADDED: dict[str, Callable[[Path], Ids]] = {"added_tokens.json": _by_token, "tokenizer_config.json": _decoder}
"""Files with added tokens, and their readers."""

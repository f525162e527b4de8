"""Ids are found wherever tokenizers keep them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from specbatch.errors import UserError
from specbatch.tokenizer_ids import tokenizer_ids


def write(folder: Path, **files: Any) -> dict[int, str]:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("__", ".")).write_bytes(data)
    return tokenizer_ids(folder)


def piece(text: str) -> bytes:
    """A sentencepiece: its text, its score (32 bits) and its type (a varint), as field 1 of the model."""
    own = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15\x00\x00\x80\xbf" + b"\x18\x01"
    return b"\x0a" + bytes([len(own)]) + own


def test_added_tokens_are_found_beside_a_whole_tokenizer(tmp_path: Path) -> None:
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_ids(tmp_path) == {0: "a", 1: "b"}
    found = write(
        tmp_path,
        added_tokens__json={"<x>": 7},
        tokenizer_config__json={"added_tokens_decoder": {"9": {"content": "<y>"}}},
    )
    assert found == {0: "a", 1: "b", 7: "<x>", 9: "<y>"}


def test_a_sentencepiece_model_is_counted_by_its_pieces(tmp_path: Path) -> None:
    model = b"".join(map(piece, ("<unk>", "▁a", "b" * 60))) + b"\x12\x02\x08\x01"
    assert write(tmp_path, tokenizer__model=model) == {0: "<unk>", 1: "▁a", 2: "b" * 60}
    assert max(write(tmp_path, added_tokens__json={"[PAD]": 3})) == 3


def test_other_vocabularies_are_known_and_others_tell_nothing(tmp_path: Path) -> None:
    assert tokenizer_ids(tmp_path) == {}
    ranks = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate((b"a", b"bc")))
    assert set(write(tmp_path, tiktoken__model=ranks)) == {0, 1}
    (tmp_path / "tiktoken.model").unlink()
    assert write(tmp_path, tokenizer__model=ranks) == {}
    assert write(tmp_path, vocab__json={"a": 0, "b": 5}) == {0: "a", 5: "b"}
    with pytest.raises(UserError, match=r"added_tokens\.json: not a tokenizer file"):
        write(tmp_path, added_tokens__json=b"{")

"""The questions in a row of the input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from specbatch.config import Data
from specbatch.corpus.conversation import Conversation, Rejected
from specbatch.corpus.forms import RowReader
from specbatch.corpus.sources import find_sources
from specbatch.regenerate.rows import InputRow, questions, read_rows


def rows_of(path: Path, *contents: Any) -> list[InputRow]:
    lines = [content if isinstance(content, str) else json.dumps(content) for content in contents]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return list(read_rows(find_sources([str(path)])))


def asked(row: InputRow, **data: Any) -> tuple[Conversation, dict[str, Any]]:
    return questions(RowReader(Data(train=[], **data)), row.content)


def test_all_known_forms_ask_the_same(tmp_path: Path):
    rows = rows_of(
        tmp_path / "rows.jsonl.gz",
        {"prompt": "Hi there"},
        {"messages": [{"role": "user", "content": "Hi there"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi there"}]}]},
        {"conversations": [{"from": "human", "value": "Hi there"}]},
    )
    assert [asked(row)[0].messages for row in rows] == [[{"role": "user", "content": "Hi there"}]] * 4


def test_an_assistants_words_are_forgotten_and_its_place_is_kept(tmp_path: Path):
    turns = [("human", "One?"), ("gpt", "1"), ("human", "Two?"), ("gpt", "2")]
    row = {"id": 7, "conversations": [{"from": who, "value": text} for who, text in turns]}
    (got,) = rows_of(tmp_path / "rows.jsonl.gz", row)
    conversation, other = asked(got)
    assert conversation.messages == [
        {"role": "user", "content": "One?"},
        {"role": "assistant"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant"},
    ]
    assert other == {"id": 7}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1]", "not an object"),
        ({"question": "Hi"}, "without the key messages or conversations or text"),
        ({"text": "Once upon a time"}, "plain text"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "no user turn"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "3"}]}, "tool calls"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "unknown role 'wizard'"),
    ],
)
def test_a_row_that_asks_nothing_says_why_and_where(tmp_path: Path, content: Any, reason: str):
    good, bad = rows_of(tmp_path / "rows.jsonl.gz", {"prompt": "Hi"}, content)
    asked(good)
    with pytest.raises(Rejected) as problem:
        asked(bad)
    assert problem.value.reason == reason
    assert bad.place == f"{tmp_path / 'rows.jsonl.gz'}:2"


def test_rows_are_read_as_the_configuration_says(tmp_path: Path):
    (row,) = rows_of(tmp_path / "rows.jsonl.gz", {"id": 1, "talk": [{"role": "user", "content": "Hi"}]})
    conversation, other = asked(row, columns={"messages": "talk"})
    assert (conversation.messages, other) == ([{"role": "user", "content": "Hi"}], {"id": 1})

"""Reads the rows of the input: conversations whose answers will be replaced."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from specbatch.config import Config
from specbatch.corpus.cache import cache_root, scanned
from specbatch.corpus.conversation import Conversation, PlainText, Rejected
from specbatch.corpus.files import Row, Unreadable
from specbatch.corpus.forms import NAMES, RowReader
from specbatch.corpus.sources import Source, find_sources
from specbatch.errors import UserError
from specbatch.rundir import RunDir, read_json, write_json


@dataclass(frozen=True)
class InputRow:
    """One row of the input, unchanged."""

    number: int
    """Number of the row over all files, from 1."""
    place: str
    """File and line."""
    content: bytes
    """The row as JSON."""


def read_rows(sources: Iterable[Source]) -> Iterator[InputRow]:
    """Yield the rows of all sources in order."""
    number = 0
    for source in sources:
        for line, content in source.rows():
            number += 1
            yield InputRow(number, f"{source.name}:{line}", _as_json(content))


def count_rows(run_dir: RunDir, config: Config) -> int:
    """Return the number of rows whose prompts a run answers; the first call records which data they are.

    Raises:
        UserError: they can't be read, there are none, or they have changed since the first call.
    """
    found = [(s.name, *scanned(cache_root(config), s)) for s in find_sources(config.data.train)]
    now = [{"source": name, "rows": rows, "digest": digest} for name, rows, digest in found]
    before = read_json(run_dir.questions)
    if before is None:
        total = sum(rows for _, rows, _ in found)
        if not total:
            raise UserError(f"data.train: {', '.join(config.data.train)}: no rows")
        write_json(run_dir.questions, {"rows": total, "sources": now})
        return total
    changed = [new["source"] for old, new in zip(before["sources"], now, strict=False) if old != new]
    if changed or len(now) != len(before["sources"]):
        raise UserError(
            f"data.train: {(changed or config.data.train)[0]} has changed since the first of its prompts was "
            "answered; restore it, or start again with another run.dir"
        )
    return int(before["rows"])


def _as_json(row: Row) -> bytes:
    if isinstance(row, bytes):
        return row
    if isinstance(row, Unreadable):
        return json.dumps({"cannot be read": row.why}).encode()
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def questions(reader: RowReader, content: bytes) -> tuple[Conversation, dict[str, Any]]:
    """Return a row's conversation without the content of assistant messages, and its other keys.

    Args:
        reader: reads rows as ``data`` says.

    Raises:
        Rejected: the row has nothing to answer.
    """
    row = reader.decoded(content)
    conversation = reader.read(row)
    if not isinstance(conversation, Conversation):
        kind = "plain text" if isinstance(conversation, PlainText) else "tokens"
        raise Rejected(kind, "it has no user turn to answer")
    roles = [message["role"] for message in conversation.messages]
    if "user" not in roles:
        raise Rejected("no user turn")
    if "tool" in roles or any("tool_calls" in message for message in conversation.messages):
        raise Rejected("tool calls", "a tool's result of another call is unknown")
    messages = [
        {"role": "assistant"} if message["role"] == "assistant" else message for message in conversation.messages
    ]
    read = {name for names in NAMES.values() for name in names} | {"history", *reader.columns}
    other = {key: value for key, value in row.items() if key not in read} if isinstance(row, dict) else {}
    return Conversation(messages, conversation.tools, conversation.variables), other

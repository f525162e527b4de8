"""The rows of the input: conversations whose answers are to be written anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from specbatch.corpus.conversation import Conversation, PlainText, Rejected, decode_line, read_row
from specbatch.corpus.sources import Source


@dataclass
class Row:
    """One row of the input."""

    number: int
    """Over all files, from 1."""
    place: str
    """File and line."""
    conversation: Conversation = field(default_factory=lambda: Conversation([]))
    """What was asked; an assistant's message has no content, only its place."""
    other: dict[str, Any] = field(default_factory=dict)
    """The row's other keys, which the output keeps."""
    problem: Rejected | None = None
    """Why nothing can be asked."""


def read_rows(sources: Iterable[Source]) -> Iterator[Row]:
    """The rows of all sources, one after the other."""
    number = 0
    for source in sources:
        for line, content in source.rows():
            number += 1
            row = Row(number, f"{source.name}:{line}")
            try:
                content = decode_line(content) if isinstance(content, bytes) else content
                row.conversation, row.other = questions(content)
            except Rejected as problem:
                row.problem = problem
            yield row


def questions(content: Any) -> tuple[Conversation, dict[str, Any]]:
    """What a row asks, and its other keys.

    Raises:
        Rejected: if it asks nothing that could be answered.
    """
    if isinstance(content, dict) and isinstance(content.get("prompt"), str) and "messages" not in content:
        content = {**content, "messages": [{"role": "user", "content": content["prompt"]}]}
    conversation = read_row(content, "auto")
    if isinstance(conversation, PlainText):
        raise Rejected("plain text", "there is nobody in it who could be answered")
    roles = [message["role"] for message in conversation.messages]
    if "user" not in roles:
        raise Rejected("no user turn")
    if "tool" in roles or any("tool_calls" in message for message in conversation.messages):
        raise Rejected("tool calls", "what a tool would say to another call is not known")
    messages = [
        {"role": "assistant"} if message["role"] == "assistant" else message for message in conversation.messages
    ]
    other = {
        key: value for key, value in content.items() if key not in ("messages", "conversations", "prompt", "system")
    }
    return Conversation(messages, conversation.tools), other

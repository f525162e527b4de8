"""The rows of the input: conversations whose answers are to be written anew."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specbatch.errors import UserError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
}
"""Roles that can be kept or answered; what a tool would say to another question can't be known."""


class Skip(Exception):
    """This row can't be done; the text says why, in the same words for the same reason."""


@dataclass
class Row:
    """One row: its number over all files, from 1, its conversation, and its other keys."""

    number: int
    place: str
    """`FILE:LINE`, for people."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    other: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Why there is no conversation in it."""


def read_rows(files: list[str], most: int | None = None) -> Iterator[Row]:
    """The rows of JSONL files, one after the other; empty lines count for nothing.

    Raises:
        UserError: a file can't be read.
    """
    number = 0
    for name in files:
        try:
            with open_text(Path(name)) as lines:
                for line_number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    if most is not None and number >= most:
                        return
                    number += 1
                    yield parse(number, f"{name}:{line_number}", line)
        except (OSError, EOFError) as error:
            raise UserError(f"{name}: {error}") from error


def open_text(path: Path) -> Any:
    """A text file, or one inside gzip; bytes that are no UTF-8 are replaced, so that the line can be named."""
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", errors="replace")


def parse(number: int, place: str, line: str) -> Row:
    """The row in a line; what is wrong with it stands in `problem`."""
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        return Row(number, place, problem=f"not JSON: {error.msg}")
    try:
        messages, other = conversation(content)
    except Skip as reason:
        return Row(number, place, problem=str(reason))
    return Row(number, place, messages, other)


def conversation(content: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a row in OpenAI's form, and its other keys.

    Raises:
        Skip: there are none that could be answered.
    """
    if not isinstance(content, dict):
        raise Skip("not an object")
    other = dict(content)
    if "messages" in content:
        turns = [(turn.get("role"), turn) for turn in objects(other.pop("messages"))]
        messages = [message(role, turn.get("content"), turn) for role, turn in turns]
    elif "conversations" in content:
        turns = [(turn.get("from"), turn) for turn in objects(other.pop("conversations"))]
        messages = [message(role, turn.get("value"), turn) for role, turn in turns]
    elif isinstance(content.get("prompt"), str):
        messages = [message("user", other.pop("prompt"), {})]
    else:
        raise Skip("neither messages nor conversations nor a prompt")
    if not any(entry["role"] == "user" for entry in messages):
        raise Skip("no user turn")
    return messages, other


def objects(turns: Any) -> list[dict[str, Any]]:
    """The turns, each an object."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Skip("the conversation is no list of objects")
    return turns


def message(role: Any, content: Any, turn: dict[str, Any]) -> dict[str, Any]:
    """One message: its role by the name that templates know, and its text. What an assistant said is not kept."""
    known = ROLES.get(str(role).lower())
    if known is None:
        raise Skip(f"role {role!r}")
    if turn.get("tool_calls"):
        raise Skip("tool calls")
    if known == "assistant":
        return {"role": known}
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise Skip("content that is no text")
    return {"role": known, "content": content}

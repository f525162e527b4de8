"""A row as its author wrote it becomes a conversation that a chat template can render, or says why not.

Nothing is guessed: a role that the table below does not know, or content that is not text, rejects the row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response"),
}
"""What roles are called in the data, in any case, and what the chat template is given for them."""

_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


class Rejected(Exception):
    """A row, or one turn of it, that gives no sample."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
        """What is counted together, and what is told of the first one only."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given: roles are those of `ROLES`, content is text."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def unfinished(self) -> bool:
        """Whether the last message is an answer that a limit cut off, as `specbatch regenerate` may keep them."""
        return self.messages[-1]["role"] == "assistant" and self.messages[-1].get("finish_reason") == "length"


@dataclass(frozen=True)
class PlainText:
    """A row without turns: every token of it is a loss token."""

    text: str = field(repr=False)


def decode_line(line: bytes) -> Any:
    """The JSON of a line.

    Raises:
        Rejected: for a blank line, and for what is not strict JSON in UTF-8.
    """
    if not line.strip():
        raise Rejected("blank line")
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise Rejected("not UTF-8", f"byte {error.start + 1} of the line: {error.reason}") from error
    except RecursionError as error:
        raise Rejected("not JSON", "nested too deeply") from error
    except ValueError as error:
        raise Rejected("not JSON", str(error)) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def read_row(row: Any, form: str) -> Conversation | PlainText:
    """What a row holds.

    Args:
        form: ``data.format``.

    Raises:
        Rejected: if it is none of the known forms.
    """
    if not isinstance(row, dict):
        raise Rejected("not an object", f"a row must be a JSON object, this is of type {type(row).__name__}")
    keys = ("messages", "conversations", "text") if form == "auto" else (form,)
    key = next((k for k in keys if row.get(k) is not None), None)
    if key is None:
        raise Rejected(f"without the key {' or '.join(keys)}", f"its keys are {', '.join(map(str, row)) or 'none'}")
    value = row[key]
    if key == "text":
        if not isinstance(value, str):
            raise Rejected("malformed", f"text is of type {type(value).__name__}")
        if not value:
            raise Rejected("empty text")
        return PlainText(value)
    if not isinstance(value, list):
        raise Rejected("malformed", f"{key} is of type {type(value).__name__}, not a list")
    if not value:
        raise Rejected("empty conversation")
    messages = [_message(message, i) for i, message in enumerate(value, 1)]
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, _tools(row.get("tools")))


def _message(message: Any, number: int) -> dict[str, Any]:
    """One message with the role and the content that templates expect; other keys stay, nulls go."""
    if not isinstance(message, dict):
        raise Rejected("malformed", f"message {number} is of type {type(message).__name__}, not an object")
    rest = {k: v for k, v in message.items() if v is not None and k not in ("role", "from", "content", "value")}
    name = message.get("role", message.get("from"))
    if not isinstance(name, str):
        raise Rejected("malformed", f"message {number} has no role")
    role = _ROLE_OF.get(name.strip().lower())
    if role is None:
        known = ", ".join(sorted(_ROLE_OF))
        raise Rejected(f"unknown role {name!r}", f"message {number}; known, in any case, are {known}")
    calls = rest.get("tool_calls")
    if calls is not None:
        rest["tool_calls"] = _tool_calls(calls, number)
        if not rest["tool_calls"]:
            del rest["tool_calls"]
    if "reasoning_content" in rest and not isinstance(rest["reasoning_content"], str):
        raise Rejected("malformed", f"reasoning_content of message {number} is not text")
    content = message.get("content", message.get("value"))
    if content is None and not rest.keys() & {"tool_calls", "reasoning_content"}:
        raise Rejected("malformed", f"message {number} has no content")
    return {"role": role, "content": _text(content, number), **rest}


def _text(content: Any, number: int) -> str:
    """Content as text. Parts are joined as SGLang joins them for templates that want text; null is empty."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Rejected("malformed", f"content of message {number} is of type {type(content).__name__}")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Rejected("content that is not text", f"message {number} has a part of type {kind}")
        texts.append(text)
    return " ".join(texts)


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object, which is what engines give to templates."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Rejected("malformed", f"tool_calls of message {number} is not a list of objects")
    result = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Rejected("malformed", f"a tool call of message {number} names no function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}", parse_constant=_refuse_constant)
            except ValueError as error:
                raise Rejected("malformed", f"arguments of a tool call of message {number}: {error}") from error
        if not isinstance(arguments, dict):
            raise Rejected("malformed", f"arguments of a tool call of message {number} are no JSON object")
        function = {**function, "arguments": arguments}
        result.append(
            {**call, "function": function} if "function" in call else {"type": "function", "function": function}
        )
    return result


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """The row's tools, which some data sets keep as JSON in a string."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise Rejected("malformed", f"tools: {error}") from error
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Rejected("malformed", "tools is not a list of objects")
    return tools

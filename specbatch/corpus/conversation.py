"""Converts a row of the data to a conversation that a chat template can render, or gives the reason why not.

Nothing is guessed: a row with a role that is not in the table below, or with content that is neither text nor, if they
are asked for, images, is rejected.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response"),
}
"""Names of roles in the data, in upper or lower case, by the name that the chat template gets."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold the reasoning before the answer."""

ARGUMENTS = ("arguments", "parameters", "args", "input")
"""Keys of a call that hold its arguments: OpenAI's, Llama's, LangChain's and Anthropic's."""

EXCLUDED = {"weight": (0, "0"), "train": (False, "false"), "loss": (False, "false")}
"""Values of a message that exclude it from what is learnt, by their key: OpenAI's, Axolotl's and ms-swift's."""

IMAGE = "\ufffc"
"""Stands for an image in the content of a message: the object replacement character."""
IMAGES = "images"
"""Key of a message for the sources of its images, in order: absolute paths and data URLs. No template sees it."""
_IMAGE_PARTS = ("image", "image_url")

_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


class Rejected(Exception):
    """A row, or one of its turns, gives no sample."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
        """The reason under which rows are counted, and the detail, which is shown for the first such row only."""


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template: roles are those of `ROLES`, content is text, in which `IMAGE` stands for images."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    """Template variables of this conversation, in addition to ``data.template_variables``."""

    @property
    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def images(self) -> list[str]:
        """The sources of all images, in order."""
        return [source for message in self.messages for source in message.get(IMAGES, ())]

    @property
    def token_ids(self) -> bool:
        """Whether any answer has the tokens that the target wrote, next to its text."""
        return any("token_ids" in message for message in self.messages)

    def learnt(self, turn: int) -> bool:
        """Return whether a message of the assistant is learnt; `EXCLUDED` says which are not."""
        message = self.messages[turn]
        return not any(message.get(key) in values for key, values in EXCLUDED.items())

    @property
    def unfinished(self) -> bool:
        """Whether the last message is an answer that a limit cut off, which `specbatch regenerate` may keep."""
        return self.messages[-1]["role"] == "assistant" and self.messages[-1].get("finish_reason") == "length"


@dataclass(frozen=True)
class PlainText:
    """A row without turns: every token of it is a loss token."""

    text: str = field(repr=False)


def decode_line(line: bytes) -> Any:
    """Return the JSON value of a line.

    Raises:
        Rejected: the line is blank, or not JSON in UTF-8; Python's NaN and Infinity are accepted.
    """
    if not line.strip():
        raise Rejected("blank line")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Rejected("not UTF-8", f"byte {error.start + 1} of the line: {error.reason}") from error
    except RecursionError as error:
        raise Rejected("not JSON", "nested too deeply") from error
    except ValueError as error:
        raise Rejected("not JSON", str(error)) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def read_row(row: Any, form: str, folder: Path | None = None) -> Conversation | PlainText:
    """Return the content of a row.

    Args:
        form: ``data.format``.
        folder: directory that paths of images are relative to; without it, images are rejected.

    Raises:
        Rejected: it has none of the known forms.
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
    messages = [_message(message, i, folder) for i, message in enumerate(value, 1)]
    system = row.get("system")
    if isinstance(system, str | list) and system and messages[0]["role"] != "system":
        messages.insert(0, _message({"role": "system", "content": system}, 0, None))
    variables = row.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise Rejected("malformed", f"chat_template_kwargs is of type {type(variables).__name__}, not an object")
    return Conversation(messages, _tools(row.get("tools")), variables)


def _message(message: Any, number: int, folder: Path | None) -> dict[str, Any]:
    """Return a message with the role and content that templates expect. Other keys are kept; nulls are removed."""
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
    if "token_ids" in rest and (role != "assistant" or not _are_ids(rest["token_ids"])):
        raise Rejected("malformed", f"token_ids of message {number} are not a list of tokens that the assistant wrote")
    if "reasoning_content" in rest and not isinstance(rest["reasoning_content"], str):
        raise Rejected("malformed", f"reasoning_content of message {number} is not text")
    content = message.get("content", message.get("value"))
    if content is None and not rest.keys() & {"tool_calls", *REASONING}:
        raise Rejected("malformed", f"message {number} has no content")
    rest.pop(IMAGES, None)
    if not isinstance(content, list):
        return {"role": role, "content": _text(content, number), **rest}
    texts, images = _parts(content, number, folder)
    if images and role != "user":
        raise Rejected("an image that is not a user's", f"message {number} is of the role {role}")
    if images and sum(text.count(IMAGE) for text in texts) > len(images):
        raise Rejected("malformed", f"message {number} has images, and the character U+FFFC in its text")
    return {"role": role, "content": "".join(texts), **rest, **({IMAGES: images} if images else {})}


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and bool(ids) and all(type(token) is int and abs(token) < 1 << 31 for token in ids)


def _text(content: Any, number: int) -> str:
    """Return content as text; null is empty text."""
    if content is None:
        return ""
    if not isinstance(content, str):
        raise Rejected("malformed", f"content of message {number} is of type {type(content).__name__}")
    return content


def _parts(content: list[Any], number: int, folder: Path | None) -> tuple[list[str], list[str]]:
    """Return the texts of the parts of a content, which are to be joined, as templates that accept parts do; and the
    sources of its images, whose texts are `IMAGE`."""
    texts, images = [], []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in _IMAGE_PARTS and folder is not None:
            images.append(_source(part, number, folder))
            text = IMAGE
        if not isinstance(text, str):
            hint = "; data.images: true takes images" if kind in _IMAGE_PARTS else ""
            raise Rejected("content that is not text", f"message {number} has a part of type {kind}{hint}")
        texts.append(text)
    return texts, images


def _source(part: dict[str, Any], number: int, folder: Path) -> str:
    """Return the source of an image, an absolute path or a data URL."""
    value = part.get(part["type"]) or part.get("path") or part.get("url")
    if isinstance(value, dict):
        value = value.get("url")
    if not isinstance(value, str) or not value:
        raise Rejected("malformed", f"message {number} has an image that names neither a file nor a data URL")
    if value.startswith("data:"):
        return value
    if value.startswith("file://"):
        value = unquote(urlparse(value).path)
    if "://" in value:
        raise Rejected("an image that is neither a file nor a data URL", f"message {number} has {value[:80]}")
    return str((folder / Path(value).expanduser()).absolute())


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects, as engines pass them to templates."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Rejected("malformed", f"tool_calls of message {number} is not a list of objects")
    result = []
    for call in calls:
        function = call.get("function") or call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Rejected("malformed", f"a tool call of message {number} names no function")
        key = arguments_key(function)
        arguments = function.get(key)
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}", parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                raise Rejected("malformed", f"arguments of a tool call of message {number}: {error}") from error
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise Rejected("malformed", f"arguments of a tool call of message {number} are not a JSON object")
        made = {"arguments" if k == key else k: v for k, v in function.items() if k == key or k != "arguments"}
        made["arguments"] = arguments
        if function is call:
            call = {"id": made.pop("id"), "type": "function"} if "id" in made else {"type": "function"}
            made = {k: v for k, v in made.items() if k not in ("type", "function")}
        result.append({**call, "function": made})
    return result


def arguments_key(function: dict[str, Any]) -> str:
    """Return the key under which a call has its arguments; `arguments` if it has none."""
    return next((key for key in ARGUMENTS if function.get(key) is not None), "arguments")


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the row's tools, which some data sets store as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except (ValueError, RecursionError) as error:
            raise Rejected("malformed", f"tools: {error}") from error
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Rejected("malformed", "tools is not a list of objects")
    return tools

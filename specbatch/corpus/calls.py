"""Converts tool calls from the forms in data sets to the one form that chat templates accept.

ShareGPT tool data have separate turns for calls (``function_call``), older OpenAI data a ``function_call`` in the
message, and both may hold the call as JSON text. Tools may lack OpenAI's wrapper.
"""

from __future__ import annotations

import json
from typing import Any

from specbatch.corpus.conversation import ROLES, Rejected, arguments_key

CALLING = ("function_call", "function-call", "tool_call", "tool_calls")
"""Roles, in any case, of turns that only call tools."""


def as_calls(messages: list[Any]) -> list[Any]:
    """Return the messages with each call in the assistant's message that makes it.

    Raises:
        Rejected: a call is malformed.
    """
    result: list[Any] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            result.append(message)
            continue
        role = message.get("role")
        name = role.strip().lower() if isinstance(role, str) else ""
        if name in CALLING:
            calls = _calls(message.get("content"), number)
            before = result[-1] if result and isinstance(result[-1], dict) else {}
            if str(before.get("role", "")).strip().lower() in ROLES["assistant"]:
                result[-1] = {**before, "tool_calls": [*(before.get("tool_calls") or []), *calls]}
            else:
                rest = {key: value for key, value in message.items() if key != "content"}
                result.append({**rest, "role": "assistant", "content": "", "tool_calls": calls})
        elif name in ROLES["assistant"] and message.get("function_call") and not message.get("tool_calls"):
            rest = {key: value for key, value in message.items() if key != "function_call"}
            result.append({**rest, "tool_calls": _calls(message["function_call"], number)})
        elif isinstance(message.get("tool_calls"), str):
            result.append({**message, "tool_calls": _from_text(message["tool_calls"], number)})
        else:
            result.append(message)
    return result


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Return one or several calls from JSON text or objects."""
    if isinstance(value, str):
        value = _from_text(value, number)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise Rejected("malformed", f"message {number} calls no function")
    return [_call(call, number) for call in calls]


def _from_text(text: str, number: int) -> Any:
    """Return calls that are stored as JSON text; None for blank text."""
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("malformed", f"message {number} calls a function, but is not JSON: {error}") from error


def _call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Rejected("malformed", f"a call of message {number} names no function")
    arguments = function.get(arguments_key(function))
    made = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {**({"id": call["id"]} if call.get("id") else {}), "type": "function", "function": made}


def wrapped(tools: Any) -> Any:
    """Return tools with the wrapper that templates and engines expect; any other value is returned unchanged.

    All of them, or each one, may be JSON text.
    """
    tools = _unless_no_json(tools)
    tools = [tools] if isinstance(tools, dict) and tools else tools
    if not isinstance(tools, list):
        return tools
    tools = [_unless_no_json(tool) for tool in tools]
    return [
        {"type": "function", "function": tool}
        if isinstance(tool, dict) and isinstance(tool.get("name"), str) and "function" not in tool
        else tool
        for tool in tools
    ]


def _unless_no_json(value: Any) -> Any:
    """Return the value of JSON text; anything else is returned unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value

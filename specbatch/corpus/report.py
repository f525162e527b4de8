"""``specbatch data --template-report``: reports how a target's chat template treats each kind of conversation."""

from __future__ import annotations

from typing import Any

import numpy as np

from specbatch.config import Config
from specbatch.corpus.convert import new_converter
from specbatch.corpus.samples import DATED, Converted, Converter
from specbatch.corpus.tokenizer import load_tokenizer

_WIDTH = 150
"""Characters of each learnt text that are shown."""


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _calls(*ports: str, content: str = "", **more: Any) -> dict[str, Any]:
    calls = [
        {"id": f"call0000{n}", "type": "function", "function": {"name": "tide", "arguments": {"port": port}}}
        for n, port in enumerate(ports)
    ]
    return _answer(content, tool_calls=calls, **more)


def _tool(text: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "name": "tide", "tool_call_id": f"call0000{number}", "content": text}


_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide",
            "description": "Tells the tide.",
            "parameters": {
                "type": "object",
                "properties": {"port": {"type": "string", "description": "A port."}},
                "required": ["port"],
            },
        },
    }
]
_ASKED = _user("Is the tide rising at Brest?")
_SUM, _NEXT = _user("What is 3 * 4?"), _user("And 3 * 5?")


def _thought(key: str) -> list[dict[str, Any]]:
    return [_SUM, _answer("12.", **{key: "Four thrice."})]


PROBES: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "one answer": ([_SUM, _answer("12.")], False),
    "several turns": ([_SUM, _answer("12."), _NEXT, _answer("15.")], False),
    "system": ([{"role": "system", "content": "Be brief."}, _SUM, _answer("12.")], False),
    "parts": (
        [
            {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "3 * 4?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "12."}]},
        ],
        False,
    ),
    "begins with the assistant": ([_answer("Hello."), _SUM, _answer("12.")], False),
    "two answers in a row": ([_SUM, _answer("12."), _answer("A dozen.")], False),
    "reasoning in reasoning_content": (_thought("reasoning_content"), False),
    "reasoning in reasoning": (_thought("reasoning"), False),
    "reasoning in thinking": (_thought("thinking"), False),
    "reasoning in the content": ([_SUM, _answer("<think>\nFour thrice.\n</think>\n\n12.")], False),
    "reasoning in several turns": ([*_thought("reasoning_content"), _NEXT, *_thought("reasoning_content")[1:]], False),
    "tools, none called": ([_SUM, _answer("12.")], True),
    "a tool call": ([_ASKED, _calls("Brest"), _tool("rising"), _answer("It rises.")], True),
    "a tool call at the end": ([_ASKED, _calls("Brest")], True),
    "parallel tool calls": (
        [_ASKED, _calls("Brest", "Cork"), _tool("rising"), _tool("falling", 1), _answer("Only at Brest.")],
        True,
    ),
    "chained tool calls": (
        [_ASKED, _calls("Brest"), _tool("no such port"), _calls("Brest, France"), _tool("rising"), _answer("Yes.")],
        True,
    ),
    "text beside a tool call": (
        [_ASKED, _calls("Brest", content="Let me look."), _tool("rising"), _answer("It rises.")],
        True,
    ),
    "reasoning before a tool call": (
        [
            _ASKED,
            _calls("Brest", reasoning_content="I have to look."),
            _tool("rising"),
            _answer("It rises.", reasoning_content="So it does."),
        ],
        True,
    ),
    "empty answer": ([_SUM, _answer(""), _NEXT, _answer("15.")], False),
    "cut answer": ([_SUM, _answer("12, which is", finish_reason="length")], False),
}
"""Messages of each kind of conversation, and whether tools belong to it."""


def template_report(config: Config) -> str:
    """Report for each kind of conversation whether it can be learnt whole, in part or not at all with the target's
    template.

    Returns:
        lines for people: the kind, the verdict with its reasons, and the text that would be loss.

    Raises:
        UserError: the target's tokenizer can't be read or has no chat template.
    """
    converter = new_converter(config, load_tokenizer(config), prompts=False)
    lines, notes = [], []
    for kind, (messages, tools) in PROBES.items():
        found = converter.convert("", {"messages": messages, **({"tools": _TOOLS} if tools else {})})
        verdict, said = _verdict(converter, found, cut="finish_reason" in messages[-1])
        notes += [text for text in found.warnings if text == DATED and text not in notes]
        lines.append(f"{kind}: {verdict}")
        lines += [f"    {text}" for text in said]
        lines += [
            f"    loss: {text if len(text) < _WIDTH else text[:_WIDTH] + ' ...'}" for text in _loss(converter, found)
        ]
    return "\n".join(lines + notes)


def _verdict(converter: Converter, found: Converted, cut: bool) -> tuple[str, list[str]]:
    """Return whether it is learnt whole, in part or refused, and why."""
    said = [text for text in dict.fromkeys(found.warnings) if text != DATED]
    said += [f"{reason}: {detail}" if detail else reason for reason, detail in found.rejected]
    if not found.samples:
        return "refused", said
    endless = sum(not text.endswith(tuple(converter.template.ends)) for text in _runs(converter, found))
    if endless and not cut:
        said.append(f"no end of turn to learn after {endless} of the answers")
    return ("in part" if said else "whole"), said


def _loss(converter: Converter, found: Converted) -> list[str]:
    return [repr(text)[1:-1] for text in _runs(converter, found)]


def _runs(converter: Converter, found: Converted) -> list[str]:
    """Return the texts of the runs of loss tokens."""
    decode, runs = converter.template.tokenizer.decode, []
    for ids, mask in found.samples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
        runs += [str(decode(ids[a:b], clean_up_tokenization_spaces=False)) for a, b in edges.reshape(-1, 2)]
    return runs

"""Words that replace parts of a conversation, so that in a rendering the template's own text can be distinguished.

Every message gets unique words: around the content of a user, a system prompt or a tool, and in place of each part of
an assistant's message (reasoning under any of its names, text, each tool call), without changing the message's
structure. A rendering then shows where each part is, and which parts are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from specbatch.corpus.conversation import REASONING, Conversation

Kind = Literal["text", "thought", "call", "around"]

TAG = re.compile(r"([<\[◁][^<>\[\]◁▷\s]{0,30}(?:think|thought|reason)[^<>\[\]◁▷\s]{0,30}[>\]▷])", re.IGNORECASE)
"""Matches tags of reasoning inside the content of an answer, which templates look for."""
_OPENING, _CLOSING = re.compile(r"<tool_\w{1,20}>"), re.compile(r"</tool_\w{1,20}>\Z")
"""Tags by which templates recognize a tool's result in a user's message."""


@dataclass(frozen=True)
class Word:
    """One unique word."""

    message: int
    kind: Kind
    """Kind of the part that it stands in: the assistant's text, reasoning or tool call, or ``around`` another's
    text."""
    name: str
    """Name of the part, for people."""
    instead_of: str = ""
    """The text that it replaced, if the template may show that text at other places too."""


@dataclass(frozen=True)
class Shown:
    """An occurrence of a word in a rendering."""

    word: int
    start: int
    end: int


class Words:
    """The words of one conversation.

    Args:
        text: the conversation as the template renders it; no word occurs in it.
    """

    def __init__(self, conversation: Conversation, text: str) -> None:
        self.conversation = conversation
        stem = "zq"
        while stem in text:
            stem += "x"
        self._stem = stem
        self._pattern = re.compile(f"{stem}(\\d+){stem[::-1]}")
        self.all: list[Word] = []

    def in_all(self, around: bool) -> Conversation:
        """Return the conversation with words in every message.

        Args:
            around: keep messages of other roles, between two words, instead of replacing each by one word.
        """
        messages = [
            self._answer(i, message) if message["role"] == "assistant" else self._other(i, message, around)
            for i, message in enumerate(self.conversation.messages)
        ]
        return replace(self.conversation, messages=messages)

    def in_one(self, i: int) -> Conversation:
        """Return the conversation with words in only one of the assistant's messages."""
        messages = list(self.conversation.messages)
        messages[i] = self._answer(i, messages[i])
        return replace(self.conversation, messages=messages)

    def find(self, text: str) -> list[Shown]:
        """Return the words in a rendering, in order."""
        return [Shown(int(match[1]), *match.span()) for match in self._pattern.finditer(text)]

    def without(self, text: str) -> str:
        """Return the text of a rendering without the words."""
        return self._pattern.sub(lambda match: self.all[int(match[1])].instead_of, text)

    def _new(self, message: int, kind: Kind, name: str, instead_of: str = "") -> str:
        self.all.append(Word(message, kind, name, instead_of))
        return f"{self._stem}{len(self.all) - 1:06d}{self._stem[::-1]}"

    def _other(self, i: int, message: dict[str, Any], around: bool) -> dict[str, Any]:
        content, name = message["content"], f"messages of the role {message['role']}"
        word = self._new(i, "around", name)
        if around:
            first, last = _core(content)
            word = content[:first] + word + content[first:last] + self._new(i, "around", name) + content[last:]
        return {**message, "content": word}

    def _answer(self, i: int, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message of the assistant with a word in place of each part, and the same structure."""
        result, before = dict(message), len(self.all)
        thoughts: dict[str, str] = {}
        for key in REASONING:
            text = message.get(key)
            if isinstance(text, str) and text.strip():
                # Some engines write the same under two names, of which a template reads only one.
                thoughts[text] = result[key] = thoughts.get(text) or self._new(i, "thought", key)
        calls = message.get("tool_calls") or []
        if message["content"].strip():
            result["content"] = self._content(i, message["content"], "text beside tool calls" if calls else "")
        if calls:
            result["tool_calls"] = [self._call(i, n, call) for n, call in enumerate(calls)]
        if len(self.all) == before:
            result["content"] = self._new(i, "text", "")
        return result

    def _content(self, i: int, content: str, name: str) -> str:
        pieces = TAG.split(content)
        texts = [n for n in range(0, len(pieces), 2) if pieces[n].strip()]
        if len(pieces) == 1 or not texts:
            return self._new(i, "text", name)
        for n in texts:
            answer = n == len(pieces) - 1
            pieces[n] = self._new(i, *(("text", name) if answer else ("thought", "reasoning inside the content")))
        return "".join(pieces)

    def _call(self, i: int, number: int, call: dict[str, Any]) -> dict[str, Any]:
        name = "a tool call after the first of a message" if number else "tool_calls"
        before, function = len(self.all), dict(call["function"])
        function["arguments"] = self._leaves(i, name, function["arguments"])
        if len(self.all) == before:
            function["name"] = self._new(i, "call", name, function["name"])
        return {**call, "function": function}

    def _leaves(self, i: int, name: str, value: Any) -> Any:
        """Return the value with a word in place of each text in it."""
        if isinstance(value, str):
            return self._new(i, "call", name)
        if isinstance(value, dict):
            return {key: self._leaves(i, name, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._leaves(i, name, item) for item in value]
        return value


def _core(text: str) -> tuple[int, int]:
    """Return where a text begins and ends without surrounding white space, which many templates remove, and without the
    tags of a tool's result, which some search."""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    if first >= last:
        return 0, 0
    if opening := _OPENING.match(text, first, last):
        first = opening.end()
    closing = _CLOSING.search(text, max(first, last - 30), last)
    return first, closing.start() if closing else last


def firsts(words: Words, text: str) -> list[Shown]:
    """Return the words in a rendering, in order; a word that the template may repeat counts only at its first place."""
    found: list[Shown] = []
    seen: set[int] = set()
    for item in words.find(text):
        if not (words.all[item.word].instead_of and item.word in seen):
            found.append(item)
        seen.add(item.word)
    return found


def left_out(words: Words, shown: set[int], learnt: set[int]) -> dict[int, list[str]]:
    """Return the parts of each message that the template does not show, by kind.

    Args:
        shown: the words that occur in the rendering.
        learnt: messages of the assistant that are loss; others are not reported.
    """
    whole = {words.all[n].message for n in shown}
    calls = {words.all[n].message for n in shown if words.all[n].kind == "call"}
    missing: dict[int, list[str]] = {}
    for n, word in enumerate(words.all):
        if n in shown or word.message in (whole if word.kind == "around" else ()):
            continue
        name = "tool_calls" if word.kind == "call" and word.message not in calls else word.name
        text = f"the chat template leaves out {name}, which the conversation has"
        found = missing.setdefault(word.message, [])
        if name and text not in found and (word.kind == "around" or word.message in learnt):
            found.append(text)
    return missing

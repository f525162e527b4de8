"""Answers of conversations that differ in their texts alone, which are proved once for all of them.

Conversations with the same roles and the same parts of messages have one outline. The answers are proved for a
conversation of that outline whose texts are unique words. The proof applies to another one if the template renders both
to the same text, apart from the words and the texts in their place: the whole conversation, and its beginning up to a
turn with the prompt that asks for it. Checking this takes a small part of the time of a proof.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from specbatch.corpus.conversation import REASONING, Conversation, Rejected
from specbatch.corpus.encoder import Span
from specbatch.corpus.mask import AnswerSpans, answers
from specbatch.corpus.template import Template
from specbatch.corpus.words import TAG

MOST = 512
"""Most outlines that are kept."""

Outline = tuple[tuple[str, ...], ...]
"""Role of each message, and the name of its reasoning if it has any."""

_WORD = re.compile(r"zw(\d{6})wz")


class Outlines:
    """Finds the answers of conversations, with one proof for all of the same outline."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._proofs: dict[tuple[Outline, tuple[int, ...]], _Proof | None] = {}

    def answers(self, conversation: Conversation, text: str, turns: Sequence[int]) -> AnswerSpans:
        """Find the parts of a conversation's text that the assistant wrote, as `mask.answers` does.

        Raises:
            Rejected: nothing can be proved.
        """
        read = _read(conversation)
        if read is not None:
            outline, texts = read
            key = outline, tuple(turns)
            if key not in self._proofs and len(self._proofs) < MOST:
                self._proofs[key] = _proof(self._template, conversation, turns)
            proof = self._proofs.get(key)
            found = proof.holds(self._template, conversation, text, texts) if proof else None
            if found is not None:
                return found
        return answers(self._template, conversation, text, turns)


class _Rendering:
    """Rendered words, each of which stands for a text."""

    def __init__(self, text: str) -> None:
        self._pieces: list[str] = _WORD.split(text)
        self._numbers = [int(number) for number in self._pieces[1::2]]
        self._words = [match.span() for match in _WORD.finditer(text)]
        self._ends = [end for _, end in self._words]

    def filled(self, texts: Sequence[str]) -> str:
        """Return the rendering with texts in place of the words."""
        pieces = self._pieces.copy()
        pieces[1::2] = [texts[number] for number in self._numbers]
        return "".join(pieces)

    def words_before(self, place: int) -> int | None:
        """Return the number of words before a place; None if it is inside a word."""
        count = bisect_right(self._ends, place)
        return None if count < len(self._words) and self._words[count][0] < place else count

    def moved(self, texts: Sequence[str]) -> list[int]:
        """Return how far a place moves that has 0, 1, 2, ... words before it."""
        grown = (
            len(texts[number]) - (end - start) for number, (start, end) in zip(self._numbers, self._words, strict=True)
        )
        return list(accumulate(grown, initial=0))

    def before(self, word: int) -> str | None:
        """Return the text between a word and the one before it; None if the word is not there."""
        return self._pieces[2 * self._numbers.index(word)] if word in self._numbers else None


@dataclass(frozen=True)
class _Beginning:
    """A rendering of the messages before a turn."""

    turn: int
    prompt: bool
    """Whether it ends with the prompt that asks for the turn."""
    rendering: _Rendering
    begins: bool
    """Whether the rendering of the whole conversation begins with it."""


@dataclass(frozen=True)
class _Proof:
    """The answers of a conversation of words."""

    whole: _Rendering
    beginnings: list[_Beginning]
    """All that the proof depends on besides ``whole``."""
    spans: dict[int, list[tuple[Span, Span]]]
    """The spans of each turn; where each begins and ends, and the words before that."""
    left_out: dict[int, list[str]]

    def holds(
        self, template: Template, conversation: Conversation, text: str, texts: Sequence[str]
    ) -> AnswerSpans | None:
        """Return the answers of another conversation of the same outline, if they are proved by this.

        Args:
            text: the conversation as it is rendered.
            texts: what it has in place of the words.
        """
        if self.whole.filled(texts) != text:
            # Many templates remove white space around a text.
            texts = [part.strip() for part in texts]
            if self.whole.filled(texts) != text:
                return None
        for beginning in self.beginnings:
            part = replace(conversation, messages=conversation.messages[: beginning.turn])
            try:
                own = template.render(part, beginning.prompt)
            except Rejected:
                return None
            if own != beginning.rendering.filled(texts) or text.startswith(own) != beginning.begins:
                return None
        moved = self.whole.moved(texts)
        spans = {
            turn: [(start + moved[i], end + moved[j]) for (start, end), (i, j) in found]
            for turn, found in self.spans.items()
        }
        return AnswerSpans(text, spans, self.left_out)


def _read(conversation: Conversation) -> tuple[Outline, list[str]] | None:
    """Return the outline of a conversation and its texts; None if it has anything else, an empty text, or reasoning
    inside an answer."""
    if conversation.tools:
        return None
    outline, texts = [], []
    for message in conversation.messages:
        names = _names(message)
        if not all(isinstance(message.get(name), str) and message[name].strip() for name in names):
            return None
        if len(message) != 1 + len(names) or (message["role"] == "assistant" and TAG.search(message["content"])):
            return None
        outline.append((message["role"], *names[1:]))
        texts += [message[name] for name in names]
    return tuple(outline), texts


def _names(message: dict[str, Any]) -> list[str]:
    """Return the keys of a message that hold text, of which reasoning may be the second."""
    if len(message) == 2:
        return ["content"]
    return ["content", *(name for name in REASONING if name in message)][:2]


def _proof(template: Template, conversation: Conversation, turns: Sequence[int]) -> _Proof | None:
    """Prove the answers of a conversation of words with the outline of a given one; None if that fails."""
    messages: list[dict[str, Any]] = []
    first: list[int] = []
    """The first word of each message."""
    count = 0
    for message in conversation.messages:
        names = _names(message)
        first.append(count)
        messages.append({**message, **{name: f"zw{count + i:06d}wz" for i, name in enumerate(names)}})
        count += len(names)
    words = replace(conversation, messages=messages)
    try:
        text = template.render(words)
        found = answers(template, words, text, turns)
        whole = _Rendering(text)
        beginnings = _beginnings(template, words, text, {turn: whole.before(first[turn]) for turn in turns})
    except Rejected:
        return None
    spans: dict[int, list[tuple[Span, Span]]] = {turn: [] for turn in found.spans}
    for turn, parts in found.spans.items():
        for start, end in parts:
            before = whole.words_before(start), whole.words_before(end)
            if before[0] is None or before[1] is None:
                return None
            spans[turn].append(((start, end), (before[0], before[1])))
    return _Proof(whole, beginnings, spans, found.left_out)


def _beginnings(template: Template, words: Conversation, text: str, turns: dict[int, str | None]) -> list[_Beginning]:
    """Return the beginnings of a conversation that decide where its turns begin.

    Args:
        text: the conversation as it is rendered.
        turns: the turns, and the text of the template before each.

    Raises:
        Rejected: the template refuses one of them.
    """
    found, seen = [], set()
    for turn, before in turns.items():
        role = words.messages[turn - 1]["role"] if turn else ""
        # After the same text following a message of the same role, a template asks with the same prompt.
        if (role, before) in seen:
            continue
        seen.add((role, before))
        part = replace(words, messages=words.messages[:turn])
        asked = template.render(part, prompt=True)
        found.append(_Beginning(turn, True, _Rendering(asked), text.startswith(asked)))
        if not found[-1].begins:
            plain = template.render(part)
            found.append(_Beginning(turn, False, _Rendering(plain), text.startswith(plain)))
    return found

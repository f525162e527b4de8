"""Finds each message of the assistant in the rendered conversation, by rendering it again with words in every message.

Text between the words of two messages comes from the template alone, and only text between the parts that both
renderings share can be an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

from specbatch.corpus.conversation import REASONING, Conversation, Rejected
from specbatch.corpus.encoder import Span
from specbatch.corpus.template import Template
from specbatch.corpus.words import Shown, Words, firsts

UNPROVED = "mask not provable"
NOT_ONCE = "the chat template does not show it exactly once"


def unproved(turn: int, why: str) -> Rejected:
    """Return the exception for a message about which something can't be proved."""
    return Rejected(UNPROVED, f"message {turn + 1}: {why}")


@dataclass(frozen=True)
class Place:
    """Place of a message of the assistant in the rendering with words."""

    start: int
    end: int
    """Range from its first word to the end of its last."""
    before: str
    """Text of the template between the words of the previous message and its own."""
    after: str
    """Text of the template between its words and those of the next message."""
    first: bool
    """Whether no other words come before it."""
    text_last: bool
    """Whether its last word is in its text rather than in its reasoning or in a tool call."""


class Skeleton:
    """The conversation with words in every message, as the template renders it, and where its messages are.

    Args:
        text: the conversation as it is rendered without the words.
        around: put words around the messages of other roles, instead of replacing these by words.

    Raises:
        Rejected: a message is shown twice or mixed with others.
    """

    def __init__(self, template: Template, conversation: Conversation, text: str, around: bool) -> None:
        self.template, self.conversation, self.text, self.around = template, conversation, text, around
        self.words = Words(conversation, text)
        self.with_words = self.words.in_all(around)
        self.rendered = template.render(self.with_words)
        self.shown = firsts(self.words, self.rendered)
        self.places = self._places()

    def _places(self) -> dict[int, Place]:
        """Return the place of each assistant message that the template shows, by its number.

        Raises:
            Rejected: a message is shown twice or mixed with others.
        """
        all_words, messages = self.words.all, self.conversation.messages
        runs = [(message, list(run)) for message, run in groupby(self.shown, lambda item: all_words[item.word].message)]
        places: dict[int, Place] = {}
        for at, (message, run) in enumerate(runs):
            if messages[message]["role"] != "assistant":
                if self.around and not _paired(run):
                    raise unproved(message, "the chat template shows a part of it only")
                continue
            if message in places or len({item.word for item in run}) < len(run):
                raise unproved(message, NOT_ONCE)
            before = self.rendered[runs[at - 1][1][-1].end if at else 0 : run[0].start]
            after = self.rendered[run[-1].end : runs[at + 1][1][0].start if at + 1 < len(runs) else None]
            places[message] = Place(
                run[0].start,
                run[-1].end,
                self.words.without(before),
                self.words.without(after),
                first=not at,
                text_last=all_words[run[-1].word].kind == "text",
            )
        return places

    def regions(self) -> dict[int, Span]:
        """Return the ranges of the text that the assistant's words stand for, by message.

        Raises:
            Rejected: the text can't be divided like this.
        """
        order = sorted(self.places, key=lambda turn: self.places[turn].start)
        if self.around:
            edges = [0, *(edge for turn in order for edge in (self.places[turn].start, self.places[turn].end)), None]
            others = [self.words.without(self.rendered[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
            regions = _cut_out(self.text, others)
            if regions is not None:
                return dict(zip(order, regions, strict=True))
        return {turn: self._alone(turn) for turn in order}

    def _alone(self, turn: int) -> Span:
        """Return the range of a message in the text, found by putting words into this message only."""
        words, around = Words(self.conversation, self.text), self.places[turn]
        text = self.template.render(words.in_one(turn))
        own = firsts(words, text)
        if not own or len({item.word for item in own}) < len(own):
            raise unproved(turn, NOT_ONCE)
        head, tail = words.without(text[: own[0].start]), words.without(text[own[-1].end :])
        if not head.endswith(around.before) or not tail.startswith(around.after):
            raise unproved(turn, "what the chat template writes around it depends on the other messages")
        region = len(head), len(self.text) - len(tail)
        if region[0] > region[1] or not self.text.startswith(head) or not self.text.endswith(tail):
            if self._is_empty(turn) and (place := self._nothing(turn, head, tail)) is not None:
                return place
            raise unproved(turn, "the chat template writes other messages differently because of it")
        return region

    def _is_empty(self, turn: int) -> bool:
        """Return whether a message has neither text nor reasoning nor calls."""
        message = self.conversation.messages[turn]
        return not message["content"].strip() and not message.keys() & {"tool_calls", *REASONING}

    def _nothing(self, turn: int, head: str, tail: str) -> Span | None:
        """Return the place of a message without content around which the template writes less than around words; None
        if that is not all of the difference."""
        place = self.places[turn]
        start = shared(self.text, head)
        after = tail[max(0, len(tail) - (len(self.text) - start)) :]
        lost = len(head) - start, len(tail) - len(after)
        if self.text[start:] != after or lost[0] > len(place.before) or lost[1] > len(place.after):
            return None
        before = place.before[: len(place.before) - lost[0]]
        self.places[turn] = replace(place, before=before, after=place.after[lost[1] :])
        return start, start


def shared(a: str, b: str) -> int:
    """Return the length of the common beginning of two texts."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a.startswith(b[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _paired(run: list[Shown]) -> bool:
    """Return whether words around a text come in pairs, one pair for each time that the template shows it."""
    numbers = [item.word for item in run]
    return len(numbers) % 2 == 0 and all(a + 1 == b for a, b in zip(numbers[::2], numbers[1::2], strict=True))


def _cut_out(text: str, others: list[str]) -> list[Span] | None:
    """Return the text between given parts of it; None if they can be placed in no way, or in more than one.

    The parts are looked for from the left and from the right. Every way to place them lies between the two.

    Args:
        others: the parts, in order; the first begins the text and the last ends it.
    """
    first, last = len(others[0]), len(text) - len(others[-1])
    if first > last or not text.startswith(others[0]) or not text.endswith(others[-1]):
        return None
    found, at = [], first
    for part in others[1:-1]:
        place = text.find(part, at, last)
        if place < 0:
            return None
        found.append(place)
        at = place + len(part)
    at = last
    for part, place in zip(reversed(others[1:-1]), reversed(found), strict=True):
        if text.rfind(part, first, at) != place:
            return None
        at = place
    starts = [first, *(place + len(part) for place, part in zip(found, others[1:-1], strict=True))]
    return list(zip(starts, [*found, last], strict=True))

"""Which characters of a rendered conversation the assistant wrote, proved for every conversation.

The proof is by replacement: the conversation is rendered again with a word that occurs nowhere else in place of
an answer. Only what lies between the two renderings' common beginning and end can be the answer. A second
rendering, with words in place of all messages, shows the text between messages as the template alone writes it;
the header that asks the assistant to speak and the token that ends a turn are looked for there and nowhere else,
so that what a user writes can't be taken for either. Where any of this does not fit, the conversation is
rejected.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

from specbatch.corpus.conversation import Conversation, Rejected
from specbatch.corpus.template import Span, Template


def answer_spans(
    template: Template, conversation: Conversation, turns: Literal["assistant", "last"]
) -> tuple[str, list[Span]]:
    """The conversation as text, and the spans of characters that are loss.

    Each span begins where the model begins to write, after the generation prompt, and ends with the token that
    ends its turn, if the template writes one.

    Args:
        turns: all of the assistant's, or the last of them.

    Raises:
        Rejected: if the template refuses the conversation, or nothing can be proved.
    """
    answers = conversation.assistant_turns
    if not answers:
        raise Rejected("no assistant turn")
    chosen = answers if turns == "assistant" else answers[-1:]
    text = template.render(conversation)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("lone surrogate", f"U+{ord(text[error.start]):04X} is half a character") from error
    skeleton = _Skeleton(template, conversation, text)
    if template.has_markers(conversation.tools):
        spans = _marked(template, conversation, skeleton, text, chosen if turns == "last" else None)
    else:
        spans = [_span(template, conversation, skeleton, text, turn) for turn in chosen]
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        raise Rejected("mask not provable", "answers overlap in what the chat template renders")
    if conversation.unfinished:
        spans[-1] = _without_end(template, text, spans[-1])
    return text, spans


def _without_end(template: Template, text: str, span: Span) -> Span:
    """The span without the token that ends its turn: the template has written it, the target had not come to it."""
    answer = text[span[0] : span[1]].rstrip()
    token = max((token for token in template.ends if answer.endswith(token)), key=len, default=None)
    return span if token is None else (span[0], span[0] + len(answer) - len(token))


class _Skeleton:
    """The conversation with a word in place of every message: what is left, the template wrote."""

    def __init__(self, template: Template, conversation: Conversation, text: str) -> None:
        self.stem = "zq"
        while self.stem in text:
            self.stem += "x"
        words = [self.word(i) for i in range(len(conversation.messages))]
        messages = [
            _stand_in(template, conversation, i, word)
            for i, (_, word) in enumerate(zip(conversation.messages, words, strict=True))
        ]
        self.conversation = replace(conversation, messages=messages)
        self.text = template.render(self.conversation)
        self.place = {i: self.text.find(word) for i, word in enumerate(words) if self.text.count(word) == 1}
        """Where each message is shown; those that the template leaves out or repeats are not in it."""
        self._order = sorted(self.place.values())

    def word(self, i: int) -> str:
        return f"{self.stem}{i:05d}{self.stem[::-1]}"

    def around(self, i: int) -> tuple[str, str]:
        """What the template writes between message i and its neighbours on both sides."""
        if i not in self.place:
            raise Rejected("mask not provable", f"the chat template does not show message {i + 1} exactly once")
        width, here, at = len(self.word(0)), self.place[i], self._order.index(self.place[i])
        before = self._order[at - 1] + width if at else 0
        after = self._order[at + 1] if at + 1 < len(self._order) else len(self.text)
        return self.text[before:here], self.text[here + width : after]


def _stand_in(template: Template, conversation: Conversation, i: int, word: str) -> dict[str, Any]:
    """Message i with a word for what it says. A message that calls tools goes on calling them."""
    message = conversation.messages[i]
    rest = {k: v for k, v in message.items() if k not in ("reasoning_content", "tool_calls")}
    calls = message.get("tool_calls")
    if not calls or "tool_calls" not in template.source(conversation.tools):
        return {**rest, "content": word}
    calls = [
        {**call, "function": {**call["function"], "arguments": {} if number else {word: ""}}}
        for number, call in enumerate(calls)
    ]
    return {**rest, "content": "", "tool_calls": calls}


def _replaced(template: Template, conversation: Conversation, i: int, word: str) -> Conversation:
    messages = list(conversation.messages)
    messages[i] = _stand_in(template, conversation, i, word)
    return replace(conversation, messages=messages)


def _span(template: Template, conversation: Conversation, skeleton: _Skeleton, text: str, turn: int) -> Span:
    """Where the assistant's message ``turn`` stands in ``text``."""

    def unproved(why: str) -> Rejected:
        return Rejected("mask not provable", f"message {turn + 1}: {why}")

    before, after = skeleton.around(turn)
    word = skeleton.word(turn)
    other = _replaced(template, conversation, turn, word)
    text2 = template.render(other)
    if text2.count(word) != 1:
        raise unproved("the chat template shows it more than once, or not at all")
    head, _, tail = text2.partition(word)
    if not head.endswith(before) or not tail.startswith(after):
        raise unproved("what the chat template writes around it depends on the other messages")
    start, prompted = _start(template, other, turn, head, before)
    ending = template.end_of_turn(after)
    if ending is None and "tool_calls" in other.messages[turn]:
        raise unproved("no token ends the turn after its tool calls")
    rest = tail[ending or 0 :]
    end = len(text) - len(rest)
    if start > end or text[:start] != head[:start] or text[end:] != rest:
        raise unproved("the chat template writes other messages differently because of it")
    if ending is not None and not text[start:end].endswith(tuple(template.ends)):
        raise unproved("its turn does not end with a token that ends turns")
    return start + len(prompted) if text.startswith(prompted, start) else start, end


def _start(template: Template, other: Conversation, turn: int, head: str, before: str) -> tuple[int, str]:
    """Where the model begins to write in ``head``, which ends where the message's text begins.

    Args:
        before: the end of ``head`` that the template alone has written.

    Returns:
        The position, and what of the generation prompt may follow it: some templates begin the reasoning in the
        prompt and leave it out of the history.
    """
    prompt = template.generation_prompt
    if prompt and prompt in before:
        return len(head) - len(before) + before.rfind(prompt) + len(prompt), ""
    if turn:
        asked = template.render(replace(other, messages=other.messages[:turn]), prompt=True)
        if head.startswith(asked) and len(asked) >= len(head) - len(before):
            return len(asked), ""
    for length in range(len(prompt) - 1, 0, -1):
        if before.endswith(prompt[:length]) and template.first_special(prompt[:length])[0]:
            return len(head), prompt[length:]
    raise Rejected("mask not provable", f"message {turn + 1}: the generation prompt does not stand before it")


def _marked(
    template: Template, conversation: Conversation, skeleton: _Skeleton, text: str, last: list[int] | None
) -> list[Span]:
    """What the template's own markers enclose; of the one turn in ``last`` if given."""
    text2, spans2 = template.render_marked(skeleton.conversation)
    width = len(skeleton.word(0))
    for i, place in skeleton.place.items():
        inside = any(a <= place and place + width <= b for a, b in spans2)
        outside = all(b <= place or place + width <= a for a, b in spans2)
        if not (inside if conversation.messages[i]["role"] == "assistant" else outside):
            raise Rejected(
                "mask not provable", f"the template's generation markers cut through or misplace message {i + 1}"
            )
    marked, spans = template.render_marked(conversation)
    if marked != text or text2 != skeleton.text or not spans:
        raise Rejected("mask not provable", "the template's generation markers enclose nothing")
    if last is None:
        return spans
    text2 = template.render(_replaced(template, conversation, last[0], skeleton.word(last[0])))
    shared = _shared(text, text2)
    chosen = [span for span in spans if span[1] > shared]
    if not chosen:
        raise Rejected("mask not provable", "the template's generation markers enclose nothing of the last turn")
    return chosen


def _shared(a: str, b: str) -> int:
    """Length of the common beginning of two texts."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low

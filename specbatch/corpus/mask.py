"""Determines which characters of a rendered conversation the assistant wrote, with a proof for every conversation.

The proof is by replacement. The conversation is rendered a second time with unique words in every message
(`specbatch.corpus.words`). Text between the words of two messages comes from the template alone: the header that asks
the assistant to speak and the token that ends a turn are looked for only there, so text of a user can't be mistaken for
them. And only text between the parts that both renderings share can be an answer. If any of this fails, the
conversation is rejected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from specbatch.corpus.conversation import REASONING, Conversation, Rejected
from specbatch.corpus.encoder import Span
from specbatch.corpus.template import REFUSED, Template
from specbatch.corpus.words import Shown, Words, firsts, left_out

_UNPROVED = "mask not provable"
_NOT_ONCE = "the chat template does not show it exactly once"


@dataclass(frozen=True)
class AnswerSpans:
    """The parts of a rendered conversation that the assistant wrote."""

    text: str
    spans: dict[int, list[Span]]
    """The characters that are loss, by the message that they belong to, in order."""
    left_out: dict[int, list[str]]
    """Parts of each message that the template does not show, with the same wording for all of a kind."""

    @property
    def all(self) -> list[Span]:
        """The spans of all messages, in order."""
        return [span for spans in self.spans.values() for span in spans]


Prompts = list[tuple[str, str, str]]
"""What a template asks for a message with: the role of the message before, the text after that message, and the
prompt."""


def answers(
    template: Template,
    conversation: Conversation,
    text: str,
    turns: Iterable[int],
    prompts: Prompts | None = None,
) -> AnswerSpans:
    """Find the parts of a conversation's text that the assistant wrote.

    Each turn begins where the model begins to write, after the generation prompt, and ends with the token that
    ends its turn, if the template writes one.

    Args:
        text: the conversation as the template renders it.
        turns: the messages of the assistant to look for.
        prompts: those that are known from beginnings of this conversation; new ones are added.

    Raises:
        Rejected: nothing can be proved.
    """
    problem, prompts = Rejected(_UNPROVED), [] if prompts is None else prompts
    # A template may inspect the beginning of a user's message; then replacing the message works where surrounding it
    # with words does not.
    for around in (True, False):
        try:
            return _Proof(template, conversation, text, around, prompts).answers(sorted(turns))
        except Rejected as error:
            problem = problem if problem.detail else error
    if problem.reason.startswith(REFUSED):
        raise Rejected(_UNPROVED, f"with other words in it the conversation is {problem.reason}")
    raise problem


def encodable(text: str) -> None:
    """Raise `Rejected` for text that can't be encoded in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("lone surrogate", f"U+{ord(text[error.start]):04X} is half a character") from error


def _unproved(turn: int, why: str) -> Rejected:
    return Rejected(_UNPROVED, f"message {turn + 1}: {why}")


@dataclass(frozen=True)
class _Place:
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


class _Proof:
    """The conversation with words in every message, and the conclusions from its rendering.

    Args:
        text: the conversation as it is rendered.
        around: put words around the messages of other roles, instead of replacing these by words.
    """

    def __init__(
        self, template: Template, conversation: Conversation, text: str, around: bool, prompts: Prompts
    ) -> None:
        self.template, self.conversation, self.text, self.around = template, conversation, text, around
        self.words = Words(conversation, text)
        self.with_words = self.words.in_all(around)
        self.skeleton = template.render(self.with_words)
        self.shown = firsts(self.words, self.skeleton)
        self.places = self._places()
        self._prompts = prompts

    def answers(self, turns: list[int]) -> AnswerSpans:
        """Return the parts of the text that are the given turns.

        Raises:
            Rejected: it can't be proved.
        """
        shown = {item.word for item in self.shown}
        self._have_answers(turns, shown)
        spoken = [turn for turn in turns if turn in self.places]
        if not spoken:
            raise _unproved(turns[0], "the chat template shows neither its tool calls nor its reasoning")
        regions = self._regions()
        if self.template.has_markers(self.conversation.tools):
            spans = self._marked(spoken, regions)
        else:
            spans = {turn: [self._span(turn, regions[turn])] for turn in spoken}
        found = AnswerSpans(self.text, spans, left_out(self.words, shown, set(turns)))
        if any(a[1] > b[0] for a, b in pairwise(found.all)):
            raise Rejected(_UNPROVED, "answers overlap in what the chat template renders")
        last = len(self.conversation.messages) - 1
        if self.conversation.unfinished and spans.get(last):
            # The template wrote an end that the target had not reached.
            spans[last][-1] = spans[last][-1][0], max(spans[last][-1][0], regions[last][1])
        return found

    def _have_answers(self, turns: list[int], shown: set[int]) -> None:
        """Raise `Rejected` if a message has text but the template shows neither that nor a call."""
        has = {(word.message, word.kind, n in shown) for n, word in enumerate(self.words.all)}
        for turn in turns:
            if (turn, "text", False) in has and not {(turn, "text", True), (turn, "call", True)} & has:
                raise _unproved(turn, _NOT_ONCE)

    def _places(self) -> dict[int, _Place]:
        """Return the place of each assistant message that the template shows, by its number.

        Raises:
            Rejected: a message is shown twice or mixed with others.
        """
        all_words, messages = self.words.all, self.conversation.messages
        runs = [(message, list(run)) for message, run in groupby(self.shown, lambda item: all_words[item.word].message)]
        places: dict[int, _Place] = {}
        for at, (message, run) in enumerate(runs):
            if messages[message]["role"] != "assistant":
                if self.around and not _paired(run):
                    raise _unproved(message, "the chat template shows a part of it only")
                continue
            if message in places or len({item.word for item in run}) < len(run):
                raise _unproved(message, _NOT_ONCE)
            before = self.skeleton[runs[at - 1][1][-1].end if at else 0 : run[0].start]
            after = self.skeleton[run[-1].end : runs[at + 1][1][0].start if at + 1 < len(runs) else None]
            places[message] = _Place(
                run[0].start,
                run[-1].end,
                self.words.without(before),
                self.words.without(after),
                first=not at,
                text_last=all_words[run[-1].word].kind == "text",
            )
        return places

    # Where answers are in the text.

    def _regions(self) -> dict[int, Span]:
        """Return the ranges of the text that the assistant's words stand for, by message.

        Raises:
            Rejected: the text can't be divided like this.
        """
        order = sorted(self.places, key=lambda turn: self.places[turn].start)
        if self.around:
            edges = [0, *(edge for turn in order for edge in (self.places[turn].start, self.places[turn].end)), None]
            others = [self.words.without(self.skeleton[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
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
            raise _unproved(turn, _NOT_ONCE)
        head, tail = words.without(text[: own[0].start]), words.without(text[own[-1].end :])
        if not head.endswith(around.before) or not tail.startswith(around.after):
            raise _unproved(turn, "what the chat template writes around it depends on the other messages")
        region = len(head), len(self.text) - len(tail)
        if region[0] > region[1] or not self.text.startswith(head) or not self.text.endswith(tail):
            if self._is_empty(turn) and (place := self._nothing(turn, head, tail)) is not None:
                return place
            raise _unproved(turn, "the chat template writes other messages differently because of it")
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

    # Where turns begin and end.

    def _span(self, turn: int, region: Span) -> Span:
        """Return the range of the text that the model writes in a turn."""
        place = self.places[turn]
        start = region[0] - len(place.before) + self._start(turn, region)
        end = region[1] + self._end(turn)
        if start > end:
            raise _unproved(turn, "it ends before it begins")
        return start, end

    def _start(self, turn: int, region: Span) -> int:
        """Return where the model begins to write, in characters from the beginning of the text before the message."""
        place, asking = self.places[turn], self.template.generation_prompt
        before = place.before
        first = region[0] - len(before)

        def stands(prompt: str, at: int) -> bool:
            # It may extend into the answer, which some templates show together with the beginning in the prompt.
            return self.text.startswith(prompt, first + at) and first + at + len(prompt) <= region[1]

        whole, begun = self._prompt(turn), self.template.prompt_beginnings
        whole_stands = whole is not None and stands(whole, 0)
        # Some templates ask for an answer only after a user's message.
        if whole is not None and whole_stands and (begun[-1] in whole if begun else not place.first):
            return len(whole)
        if whole is not None and whole.startswith(before):
            return len(before)
        find = before.rfind if place.first else before.find
        at = find(asking) if asking else -1
        if at >= 0:
            return at + len(asking)
        # Prompt and history agree only at their start: a thought that the prompt opens is not in the history, or is
        # closed there at once.
        shared = base = 0
        if whole is not None and not place.first:
            shared, base = self.template.parting(whole, before), self._unasked(turn, whole)
            if whole[base:shared].strip():
                return shared
        for prompt in begun:
            at = find(prompt)
            if at >= 0:
                rest = before[at:]
                return at + (len(rest) if asking.startswith(rest) else self.template.parting(asking, rest))
        if place.first and not asking:
            return len(before)
        if whole is not None and whole_stands and not place.first:
            return len(whole)
        # A turn that continues after a tool's result may have no header.
        after_tool = turn > 0 and self.conversation.messages[turn - 1]["role"] == "tool"
        if after_tool and begun and whole is not None and (shared or not base):
            return shared
        raise _unproved(turn, "the generation prompt is not before it")

    def _prompt(self, turn: int) -> str | None:
        """Return the text of the template after the words of the previous message when it asks for this one; None if it
        refuses to."""
        messages, before = self.with_words.messages[:turn], self.places[turn].before
        role = messages[-1]["role"] if turn else ""
        # After the same text following a message of the same role, the template asks with the same text.
        for known, head, found in self._prompts:
            if known == role and before[: len(head)] == head:
                return found
        try:
            found = self._tail(messages, prompt=True)
        except Rejected:
            return None
        self._prompts.append((role, before[: len(found) + 1], found))
        return found

    def _unasked(self, turn: int, asked: str) -> int:
        """Return the number of characters that the template writes both when it asks for a message and when not."""
        try:
            plain = self._tail(self.with_words.messages[:turn], prompt=False)
        except Rejected:
            return len(asked)
        if asked == plain and not self.template.generation_prompt:
            return 0  # it always asks
        return len(plain) if asked.startswith(plain) else len(asked)

    def _tail(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        """Return the text of the template after the last words of some messages."""
        text = self.template.render(replace(self.with_words, messages=messages), prompt)
        shown = firsts(self.words, text)
        return self.words.without(text[shown[-1].end if shown else 0 :])

    def _end(self, turn: int) -> int:
        """Return the number of characters after the message that the model writes."""
        place = self.places[turn]
        end = self.template.end_of_turn(place.after)
        if end is not None or place.text_last:
            return end or 0
        # The model writes the end of a call or of reasoning, but not the header of the next turn.
        shared = place.after
        if turn < len(self.conversation.messages) - 1:
            try:
                alone = self._tail([{"role": "user", "content": "question"}, self.with_words.messages[turn]], False)
            except Rejected as problem:
                raise _unproved(turn, "no token ends the turn after its tool calls") from problem
            whole = place.after.startswith(alone)
            shared = alone if whole else alone[: self.template.parting(alone, place.after)]
        return len(shared.rstrip())

    # Templates that mark themselves what is generated.

    def _marked(self, turns: list[int], regions: dict[int, Span]) -> dict[int, list[Span]]:
        """Return the parts of the turns that the template's own markers enclose."""
        skeleton, marks = self.template.render_marked(self.with_words)
        for item in self.shown:
            message = self.words.all[item.word].message
            inside = any(a <= item.start and item.end <= b for a, b in marks)
            outside = all(b <= item.start or item.end <= a for a, b in marks)
            if not (inside if self.conversation.messages[message]["role"] == "assistant" else outside):
                raise _unproved(message, "the template's generation markers cut through or misplace it")
        text, marks = self.template.render_marked(self.conversation)
        if text != self.text or skeleton != self.skeleton or not marks:
            raise Rejected(_UNPROVED, "the template's generation markers enclose nothing")
        spans: dict[int, list[Span]] = {turn: [] for turn in turns}
        for turn in turns:
            place, (start, end) = self.places[turn], regions[turn]
            around = start - len(place.before), end + len(place.after)
            for mark in marks:
                # The end of a message may be marked separately.
                if around[0] <= mark[0] and mark[1] <= around[1] and mark[1] > start:
                    spans[turn].append(mark)
        for turn in turns:
            if not spans[turn]:
                raise _unproved(turn, "the template's generation markers enclose nothing of it")
            spans[turn] = self._written(turn, regions[turn], spans[turn])
        return spans

    def _written(self, turn: int, region: Span, marks: list[Span]) -> list[Span]:
        """Return the marked parts of a turn without the prompt before it and what follows its end, which some templates
        enclose too, but the model does not write."""
        try:
            start, end = self._span(turn, region)
        except Rejected:
            return marks
        return [(max(a, start), min(b, end)) for a, b in marks if max(a, start) < min(b, end)] or marks


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

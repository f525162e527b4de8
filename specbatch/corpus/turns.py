"""Finds where the model begins and ends to write in a turn: behind the prompt that asks for it, and with its end.

The header that asks the assistant to speak and the token that ends a turn are looked for only in text of the template,
so text of a user can't be mistaken for them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from specbatch.corpus.conversation import Rejected
from specbatch.corpus.encoder import Span
from specbatch.corpus.skeleton import Skeleton, unproved
from specbatch.corpus.words import firsts

Prompts = list[tuple[str, str, str]]
"""What a template asks for a message with: the role of the message before, the text after that message, and the
prompt."""


class Turns:
    """The turns of a conversation, with what the template writes before and after its messages.

    Args:
        prompts: those that are known from beginnings of this conversation; new ones are added.
    """

    def __init__(self, skeleton: Skeleton, prompts: Prompts) -> None:
        self._conversation, self._template, self._text = skeleton.conversation, skeleton.template, skeleton.text
        self._words, self._with_words, self._places = skeleton.words, skeleton.with_words, skeleton.places
        self._prompts = prompts

    def span(self, turn: int, region: Span) -> Span:
        """Return the range of the text that the model writes in a turn."""
        place = self._places[turn]
        start = region[0] - len(place.before) + self._start(turn, region)
        end = region[1] + self._end(turn)
        if start > end:
            raise unproved(turn, "it ends before it begins")
        return start, end

    def _start(self, turn: int, region: Span) -> int:
        """Return where the model begins to write, in characters from the beginning of the text before the message."""
        place, asking = self._places[turn], self._template.generation_prompt
        before = place.before
        first = region[0] - len(before)

        def stands(prompt: str, at: int) -> bool:
            # It may extend into the answer, which some templates show together with the beginning in the prompt.
            return self._text.startswith(prompt, first + at) and first + at + len(prompt) <= region[1]

        whole, begun = self._prompt(turn), self._template.prompt_beginnings
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
        # Some templates separate messages with white space, which is not before the first one.
        if place.first and asking.strip() and before.endswith(asking.lstrip()):
            return len(before)
        if whole is not None and (end := self._template.end_of_header(whole, before)):
            return end
        # Prompt and history agree only at their start: a thought that the prompt opens is not in the history, or is
        # closed there at once.
        shared = base = 0
        if whole is not None and not place.first:
            shared, base = self._template.parting(whole, before), self._unasked(turn, whole)
            if whole[base:shared].strip():
                return shared
        for prompt in begun:
            at = find(prompt)
            if at >= 0:
                rest = before[at:]
                return at + (len(rest) if asking.startswith(rest) else self._template.parting(asking, rest))
        if place.first and not asking:
            return len(before)
        if whole is not None and whole_stands and not place.first:
            return len(whole)
        # A turn that continues after a tool's result may have no header.
        after_tool = turn > 0 and self._conversation.messages[turn - 1]["role"] == "tool"
        if after_tool and begun and whole is not None and (shared or not base):
            return shared
        raise unproved(turn, "the generation prompt is not before it")

    def _prompt(self, turn: int) -> str | None:
        """Return the text of the template after the words of the previous message when it asks for this one; None if it
        refuses to."""
        messages, before = self._with_words.messages[:turn], self._places[turn].before
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
            plain = self._tail(self._with_words.messages[:turn], prompt=False)
        except Rejected:
            return len(asked)
        if asked == plain and not self._template.generation_prompt:
            return 0  # it always asks
        return len(plain) if asked.startswith(plain) else len(asked)

    def _tail(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        """Return the text of the template after the last words of some messages."""
        text = self._template.render(replace(self._with_words, messages=messages), prompt)
        shown = firsts(self._words, text)
        return self._words.without(text[shown[-1].end if shown else 0 :])

    def _end(self, turn: int) -> int:
        """Return the number of characters after the message that the model writes."""
        place = self._places[turn]
        end = self._template.end_of_turn(place.after)
        if end is not None or place.text_last:
            return end or 0
        # The model writes the end of a call or of reasoning, but not the header of the next turn.
        shared = place.after
        if turn < len(self._conversation.messages) - 1:
            try:
                alone = self._tail([{"role": "user", "content": "question"}, self._with_words.messages[turn]], False)
            except Rejected as problem:
                raise unproved(turn, "no token ends the turn after its tool calls") from problem
            whole = place.after.startswith(alone)
            shared = alone if whole else alone[: self._template.parting(alone, place.after)]
        return len(shared.rstrip())

"""Finds the answers in plain text that a chat template has already rendered, by the target's own headers.

A text with headers of another template, or with the target's in a place where they make no sense, is refused: taken
as plain text, its prompts would be learnt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from specbatch.corpus.conversation import Conversation, Rejected
from specbatch.corpus.encoder import Span
from specbatch.corpus.template import Template
from specbatch.errors import UserError

_WORDS = ("zqaskxa", "zqsayxb", "zqaskxc", "zqsayxd")
_ROLE = "(?:user|assistant|system|human|bot|prompter|chatbot)"
_MARKS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<\|header_start\|>|<start_of_turn>|<\|start\|>|\[INST\]|<\|turn>"
    # A role's name, alone or with another word, in a token: <|user|>, <|im_user|>, <|user_start|>, <|USER_TOKEN|>.
    rf"|<[|｜](?i:[a-z]{{2,8}}_)?(?i:{_ROLE})(?i:_[a-z]{{2,8}})?[|｜]>|<(?:_?(?:human|user|bot)>:|_(?:user|bot)>)"
    rf"|<role>(?i:{_ROLE})</role>|\[\|(?:user|assistant|Human|AI)\|\]|\]~b\](?:user|ai|system)\b"
    r"|<\|START_OF_TURN_TOKEN\|>|<\|(?:start_of_)?role(?:_start|_sep)?\|>|<\|(?:prompt|answer|beginofuser)\|>"
    rf"|<(?:seed:bos|extra_id_1|SPECIAL_1[01]|s)>(?i:{_ROLE})\b|GPT4 Correct User:"
)
"""Beginnings of headers in published chat templates."""
_DIALOGUES = tuple(
    (
        re.compile(rf"^\W{{0,4}}{first}:", re.MULTILINE | re.IGNORECASE),
        re.compile(rf"^\W{{0,4}}{second}:", re.MULTILINE | re.IGNORECASE),
        # Nothing is tried again in a line whose first question has no answer: that would take quadratic time.
        re.compile(rf"^(?>[^\n]*?\b{first}: )[^\n]*?\b{second}:", re.MULTILINE | re.IGNORECASE),
    )
    for first, second in (("(?:user|human)", "(?:assistant|AI|bot|chatbot|gpt)"), ("instruction", "response"))
)
"""Pairs of headers that are words: the one of a question, of its answer, and both in one line."""


@dataclass(frozen=True)
class _Headers:
    """Texts that the target's template writes around an answer."""

    bos: str
    """Text before everything else."""
    ask: str
    """Text between a question and the answer, without the end of the question."""
    thought: str
    """The part of the generation prompt that an answer in the history may begin with: the target does not write it."""
    end: str
    """Text that ends an answer."""
    end_is_written: bool
    """Whether the target writes it itself; else it belongs to the next message."""
    user: str
    """Text before a question."""


class Preformatted:
    """Finds the answers in rendered texts."""

    def __init__(self, template: Template) -> None:
        self._template = template

    def take_apart(self, text: str) -> tuple[str, list[Span]] | None:
        """Return the text as the target gets it, and the spans of characters that are loss; None for plain text.

        Raises:
            Rejected: a text with headers can't be parsed.
        """
        known = self._headers
        if known is None or known.ask not in text:
            self._refuse_other(text, known)
            return None
        if known.bos and not text.startswith(known.bos):
            text = known.bos + text
        spans: list[Span] = []
        at = text.find(known.ask)
        while at >= 0:
            start = at + len(known.ask)
            if known.thought and text.startswith(known.thought, start):
                start += len(known.thought)
            end = text.find(known.end, start)
            following = text.find(known.ask, start)
            if 0 <= following < (end if end >= 0 else len(text)):
                raise Rejected("preformatted text", f"an answer has no end before the next one begins: {known.end!r}")
            if known.user and text.find(known.user, start, end if end >= 0 else len(text)) >= 0:
                raise Rejected("preformatted text", f"an answer has no end before {known.user!r}: {known.end!r}")
            stop = len(text) if end < 0 else end + len(known.end) * known.end_is_written
            spans.append((start, stop))
            at = following
        return text, spans

    def _refuse_other(self, text: str, known: _Headers | None) -> None:
        found = _MARKS.search(text)
        mark = found[0] if found else _dialogue(text)
        if known is not None and known.user and known.user in text:
            mark = known.user
        if mark:
            shown = " ".join(mark.split())[:40]
            raise Rejected(
                "preformatted text",
                f"it has {shown!r}, and not what the target's template writes before an answer"
                + (f": {known.ask!r}" if known else ""),
            )

    @cached_property
    def _headers(self) -> _Headers | None:
        """Return the target's headers; None if it has no chat template, or one that does not reveal them."""
        template, roles = self._template, ("user", "assistant", "user", "assistant")
        talk = [{"role": role, "content": word} for role, word in zip(roles, _WORDS, strict=True)]
        try:
            text = template.render(Conversation(talk))
            asked, prompted = (template.render(Conversation(talk[:1]), prompt=prompt) for prompt in (False, True))
        except (Rejected, UserError):
            return None
        pieces = re.split("|".join(_WORDS), text)
        if len(pieces) != 5 or not prompted.startswith(asked):
            return None
        prompt = prompted[len(asked) :]
        # Some templates open a thought in the prompt and leave it out of the history.
        shared = next((n for n in range(len(prompt), 0, -1) if pieces[1].endswith(prompt[:n])), 0)
        ask, thought = prompt[:shared], prompt[shared:]
        ending = template.end_of_turn(pieces[2])
        end, user = (pieces[2][:ending], pieces[2][ending:]) if ending else (pieces[2], "")
        bos = template.tokenizer.bos_token
        if not ask.strip() or not end.strip():
            return None
        return _Headers(bos if bos and text.startswith(bos) else "", ask, thought, end, bool(ending), user.strip())


def _dialogue(text: str) -> str:
    """Return the first part of a text from the header of a question to that of its answer; empty if there is none."""
    for first, second, both in _DIALOGUES:
        asked = first.search(text)
        answered = asked and second.search(text, asked.end())
        if asked and answered:
            return text[asked.start() : answered.end()]
        if beside := both.search(text):
            return beside[0]
    return ""

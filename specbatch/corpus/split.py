"""Divides a rendered conversation into one text for each turn, that turn being the last, as the template writes it.

Most turns cost no rendering and no proof, since their text is the beginning of the whole conversation's.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from specbatch.corpus.conversation import Conversation, Rejected
from specbatch.corpus.encoder import Span
from specbatch.corpus.mask import AnswerSpans, answers, encodable
from specbatch.corpus.skeleton import shared
from specbatch.corpus.template import Template
from specbatch.corpus.turns import Prompts


@dataclass(frozen=True)
class Turn:
    """One turn, and the text up to it."""

    conversation: Conversation
    """The messages up to it."""
    text: str
    spans: list[Span]
    """The characters that are loss; none if the template does not show the turn."""
    left_out: list[str]
    """Parts of this message and of those since the last turn that the template does not show."""
    seam: int = 0
    """A position up to which the text is that of the whole conversation, and at which both can be divided."""
    continued: bool = False
    """Whether the text goes on after the turn."""


def split(template: Template, conversation: Conversation, text: str, turns: Sequence[int]) -> Iterator[Turn | Rejected]:
    """Yield each turn, or the reason why there is no sample of it.

    A turn that the template refuses as the last is taken from the whole conversation.

    Args:
        text: the conversation as it is rendered.
        turns: messages of the assistant, in order.
    """
    prompts: Prompts = []
    try:
        whole = answers(template, conversation, text, turns, prompts)
    except Rejected:
        whole = None
    ends, seams = template.ends_of_messages(conversation, text), template.encoder.seams(text)
    for before, turn in pairwise([-1, *turns]):
        part = replace(conversation, messages=conversation.messages[: turn + 1])
        try:
            if turn == len(conversation.messages) - 1:
                own = text
            elif ends and turn > 1:
                own = text[: ends[turn]]
            else:
                own = template.render(part)
                encodable(own)
            if whole and _holds_alone(template, whole, conversation, turn, own):
                found = whole
            else:
                found = answers(template, part, own, [turn], prompts)
            continued = False
        except Rejected as problem:
            if whole is None:
                yield problem
                continue
            own, found, continued = text, whole, True
        left_out = [said for i in range(before + 1, turn + 1) for said in found.left_out.get(i, [])]
        spans = found.spans.get(turn, [])
        if continued and spans:
            after = bisect_left(seams, (spans[-1][1], 0))
            own = text[: seams[after][0]] if after < len(seams) else text
        yield Turn(part, own, spans, left_out, _last_seam(text, own, seams, spans), continued)


def _holds_alone(template: Template, whole: AnswerSpans, conversation: Conversation, turn: int, own: str) -> bool:
    """Return whether what was found in the whole conversation is what would be found in a beginning of its text.

    The turn has to end in it with a token that ends turns, and not by a limit, which is known of the last turn only.
    """
    spans, message = whole.spans.get(turn), conversation.messages[turn]
    if turn == len(conversation.messages) - 1:
        return True
    if not spans or "finish_reason" in message or not whole.text.startswith(own):
        return False
    return spans[-1][1] <= len(own) and whole.text.endswith(template.ends, 0, spans[-1][1])


def _last_seam(text: str, own: str, seams: list[Span], spans: list[Span]) -> int:
    """Return the last seam of a text at which a turn's own text has the same token, and before which no loss is."""
    if not spans:
        return 0
    both = min(
        bisect_right(seams, shared(text, own), key=lambda seam: seam[1]),
        bisect_right(seams, spans[0][0], key=lambda seam: seam[0]),
    )
    return seams[both - 1][0] if both else 0

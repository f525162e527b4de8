"""Determines which characters of a rendered conversation the assistant wrote, with a proof for every conversation.

The proof is by replacement. The conversation is rendered a second time with unique words in every message
(`specbatch.corpus.words`). They tell where each message is in the text (`skeleton`), and where the model begins and
ends to write in each turn (`turns`). If any of this fails, the conversation is rejected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from specbatch.corpus.conversation import Conversation, Rejected
from specbatch.corpus.encoder import Span
from specbatch.corpus.skeleton import NOT_ONCE, UNPROVED, Skeleton, unproved
from specbatch.corpus.template import REFUSED, Template
from specbatch.corpus.turns import Prompts, Turns
from specbatch.corpus.words import left_out


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
    problem, prompts = Rejected(UNPROVED), [] if prompts is None else prompts
    # A template may inspect the beginning of a user's message; then replacing the message works where surrounding it
    # with words does not.
    for around in (True, False):
        try:
            skeleton = Skeleton(template, conversation, text, around)
            return _proved(skeleton, Turns(skeleton, prompts), sorted(turns))
        except Rejected as error:
            problem = problem if problem.detail else error
    if problem.reason.startswith(REFUSED):
        raise Rejected(UNPROVED, f"with other words in it the conversation is {problem.reason}")
    raise problem


def encodable(text: str) -> None:
    """Raise `Rejected` for text that can't be encoded in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("lone surrogate", f"U+{ord(text[error.start]):04X} is half a character") from error


def _proved(skeleton: Skeleton, edges: Turns, turns: list[int]) -> AnswerSpans:
    """Return the parts of the text that are the given turns.

    Raises:
        Rejected: it can't be proved.
    """
    shown = {item.word for item in skeleton.shown}
    _have_answers(skeleton, turns, shown)
    spoken = [turn for turn in turns if turn in skeleton.places]
    if not spoken:
        raise unproved(turns[0], "the chat template shows neither its tool calls nor its reasoning")
    regions = skeleton.regions()
    if skeleton.template.has_markers(skeleton.conversation.tools):
        spans = _marked(skeleton, edges, spoken, regions)
    else:
        spans = {turn: [edges.span(turn, regions[turn])] for turn in spoken}
    found = AnswerSpans(skeleton.text, spans, left_out(skeleton.words, shown, set(turns)))
    if any(a[1] > b[0] for a, b in pairwise(found.all)):
        raise Rejected(UNPROVED, "answers overlap in what the chat template renders")
    last = len(skeleton.conversation.messages) - 1
    if skeleton.conversation.unfinished and spans.get(last):
        # The template wrote an end that the target had not reached.
        spans[last][-1] = spans[last][-1][0], max(spans[last][-1][0], regions[last][1])
    return found


def _have_answers(skeleton: Skeleton, turns: list[int], shown: set[int]) -> None:
    """Raise `Rejected` if a message has text but the template shows neither that nor a call."""
    has = {(word.message, word.kind, n in shown) for n, word in enumerate(skeleton.words.all)}
    for turn in turns:
        if (turn, "text", False) in has and not {(turn, "text", True), (turn, "call", True)} & has:
            raise unproved(turn, NOT_ONCE)


def _marked(skeleton: Skeleton, edges: Turns, turns: list[int], regions: dict[int, Span]) -> dict[int, list[Span]]:
    """Return the parts of the turns that the template's own markers enclose."""
    rendered, marks = skeleton.template.render_marked(skeleton.with_words)
    for item in skeleton.shown:
        message = skeleton.words.all[item.word].message
        inside = any(a <= item.start and item.end <= b for a, b in marks)
        outside = all(b <= item.start or item.end <= a for a, b in marks)
        if not (inside if skeleton.conversation.messages[message]["role"] == "assistant" else outside):
            raise unproved(message, "the template's generation markers cut through or misplace it")
    text, marks = skeleton.template.render_marked(skeleton.conversation)
    if text != skeleton.text or rendered != skeleton.rendered or not marks:
        raise Rejected(UNPROVED, "the template's generation markers enclose nothing")
    spans: dict[int, list[Span]] = {turn: [] for turn in turns}
    for turn in turns:
        place, (start, end) = skeleton.places[turn], regions[turn]
        around = start - len(place.before), end + len(place.after)
        for mark in marks:
            # The end of a message may be marked separately.
            if around[0] <= mark[0] and mark[1] <= around[1] and mark[1] > start:
                spans[turn].append(mark)
    for turn in turns:
        empty = regions[turn][0] == regions[turn][1]
        if not spans[turn] and not empty:
            raise unproved(turn, "the template's generation markers enclose nothing of it")
        marked = spans[turn]
        spans[turn] = _written(edges, turn, regions[turn], marked) if marked else [edges.span(turn, regions[turn])]
    return spans


def _written(edges: Turns, turn: int, region: Span, marks: list[Span]) -> list[Span]:
    """Return the marked parts of a turn without the prompt before it and what follows its end, which some templates
    enclose too, but the model does not write; and with its end, which some do not enclose, but the model writes."""
    try:
        start, end = edges.span(turn, region)
    except Rejected:
        return marks
    written = [(max(a, start), min(b, end)) for a, b in marks if max(a, start) < min(b, end)] or marks
    last = written[-1]
    return [*written[:-1], (last[0], max(last[1], end))] if last[1] >= region[1] else written

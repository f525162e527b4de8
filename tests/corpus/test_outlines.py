"""A proof that is used again gives what a proof of the conversation's own does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from specbatch.corpus import mask, outlines
from specbatch.corpus.conversation import Conversation, Rejected, read_row
from specbatch.corpus.mask import AnswerSpans
from specbatch.corpus.outlines import Outlines
from specbatch.corpus.template import Template
from tests.corpus import templates
from tests.corpus.test_kinds import Kind

TEMPLATES = {name: text for name, text in vars(templates).items() if isinstance(text, str) and "{%" in text}
ASKED = ("Hi", " Hi\n", "/quick", "<tool_response>x</tool_response>", "zw000001wz", "Ho.<|stop|>\n<|say|>", "<think>\n")
SAID = ("Ho.", "\n\nHo. ", "<think>\nthrice</think>12.", "</think>Ho.", "zw000000wz", "<|say|>Hi<|stop|>", "Hi")


def conversations() -> list[Conversation]:
    found: list[list[dict[str, Any]]] = []
    for asked, said in itertools.islice(itertools.product(ASKED, SAID), 0, None, 4):
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        found += [
            talk,
            [*talk, {"role": "user", "content": "And?"}, {"role": "assistant", "content": f"{said} {asked}"}],
            [{"role": "system", "content": asked}, talk[0], talk[1]],
            [talk[0], {**talk[1], "reasoning_content": "thrice"}],
            [*talk, {"role": "user", "content": "And?"}, {**talk[1], "thinking": said}],
            [talk[1], *talk],
        ]
    return [
        conversation
        for messages in found
        if isinstance(conversation := read_row({"messages": messages}, "auto"), Conversation)
    ]


def of_own(template: Template, conversation: Conversation, text: str, turns: list[int]) -> AnswerSpans | None:
    try:
        return mask.answers(template, conversation, text, turns)
    except Rejected:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_gives_what_a_proof_of_its_own_gives(kind: Kind, name: str) -> None:
    template = kind(TEMPLATES[name]).template
    known = Outlines(template)
    for conversation in conversations():
        for turns in (conversation.assistant_turns, conversation.assistant_turns[-1:]):
            try:
                text = template.render(conversation)
            except Rejected:
                continue
            try:
                found = known.answers(conversation, text, turns)
            except Rejected:
                found = None
            assert found == of_own(template, conversation, text, turns), (conversation, turns)


def test_most_conversations_of_an_outline_need_no_proof_of_their_own(
    kind: Kind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = kind(templates.TWO_ENDS).template
    proofs: list[Conversation] = []

    def counted(template: Template, conversation: Conversation, text: str, turns: list[int]) -> AnswerSpans:
        proofs.append(conversation)
        return mask.answers(template, conversation, text, turns)

    monkeypatch.setattr(outlines, "answers", counted)
    known = Outlines(template)
    for n in range(9):
        talk = [{"role": "user", "content": f"{n}?" * n or "0"}, {"role": "assistant", "content": "So." * (n + 1)}]
        conversation = read_row({"messages": talk}, "auto")
        assert isinstance(conversation, Conversation)
        text = template.render(conversation)
        found = known.answers(conversation, text, [1])
        assert [text[a:b] for a, b in found.all] == ["So." * (n + 1) + "<|shut|><|stop|>"]
    assert len(proofs) == 1

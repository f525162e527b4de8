"""Every kind of template: what is learnt is what the target would write, and what is lost is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from specbatch.config import Data
from specbatch.corpus.conversation import Conversation, read_row
from specbatch.corpus.mask import answers
from specbatch.corpus.samples import Converter
from specbatch.drafts.eagle3.algorithm import Eagle3
from specbatch.errors import UserError
from tests.corpus import templates as t
from tests.corpus.test_mask import changed, supervised, talk
from tests.tiny_target import tokenizer as tiny_tokenizer

Kind = Callable[..., Converter]


def call(*ports: Any, content: str = "", **more: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "tide", "arguments": {"port": port}}} for port in ports]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def got(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


ASKED = {"role": "user", "content": "Tide?"}
PLAIN = talk("River?", "The Rhine.", "Longer?", "The Aare.")
THOUGHT = talk("3 * 4?", "12.", reasoning_content="thrice")
CALLED = {"messages": [ASKED, call("Brest"), got("up"), {"role": "assistant", "content": "It rises."}]}
PARALLEL = {"messages": [ASKED, call("Brest", "Cork"), got("up"), got("down"), talk("", "Both.")["messages"][1]]}
CHAINED = {"messages": [ASKED, call("Bret"), got("none"), call("Brest"), got("up"), talk("", "Up.")["messages"][1]]}
NUMBERS = {"messages": [ASKED, call(7, 8), got("up"), talk("", "Up.")["messages"][1]]}
BREST, CORK = '<call>tide {"port": "Brest"}</call>', '<call>tide {"port": "Cork"}</call>'
LOST = "the chat template leaves out {}, which the conversation has"
SHUT, NEXT = ("<|shut|>",), ("<|ask|>", "<|got|>")

CASES: list[tuple[str, tuple[str, ...], dict[str, Any], list[str], list[str]]] = [
    (t.THOUGHT_OPENED, (), PLAIN, ["The Rhine.<|stop|>", "The Aare.<|stop|>"], []),
    (t.THOUGHT_OPENED, (), THOUGHT, ["12.<|stop|>"], ["reasoning_content"]),
    (
        t.THOUGHT_OPENED,
        (),
        talk("3 * 4?", "<think>thrice</think>12."),
        ["12.<|stop|>"],
        ["reasoning inside the content"],
    ),
    (t.THOUGHT_OPENED, (), CALLED, [f"{BREST}<|stop|>", "It rises.<|stop|>"], []),
    (t.THOUGHT_OPENED, (), PARALLEL, [f"{BREST}{CORK}<|stop|>", "Both.<|stop|>"], []),
    (t.THOUGHT_OPENED, (), {"messages": CALLED["messages"][:2]}, [f"{BREST}<|stop|>"], []),
    (
        t.THOUGHT_OPENED,
        (),
        NUMBERS,
        ['<call>tide {"port": 7}</call><call>tide {"port": 8}</call><|stop|>', "Up.<|stop|>"],
        [],
    ),
    (t.THOUGHT_CLOSED, (), PLAIN, ["</think>The Rhine.<|stop|>", "</think>The Aare.<|stop|>"], []),
    (t.THOUGHT_CLOSED, (), THOUGHT, ["thrice</think>12.<|stop|>"], []),
    (t.THOUGHT_CLOSED, (), talk("3 * 4?", "12.", thinking="thrice"), ["</think>12.<|stop|>"], ["thinking"]),
    (t.THOUGHT_CLOSED, (), talk("3 * 4?", "12.", reasoning="thrice"), ["</think>12.<|stop|>"], ["reasoning"]),
    (t.THOUGHT_EMPTY, (), PLAIN, ["</think>The Rhine.<|stop|>", "</think>The Aare.<|stop|>"], []),
    (t.TWO_ENDS, (), PLAIN, ["The Rhine.<|shut|><|stop|>", "The Aare.<|shut|><|stop|>"], []),
    (t.TWO_ENDS, SHUT, PLAIN, ["The Rhine.<|shut|>", "The Aare.<|shut|>"], []),
    (t.CHANNELS, SHUT, PLAIN, ["speak<|part|>The Rhine.<|shut|>", "speak<|part|>The Aare.<|stop|>"], []),
    (t.CHANNELS, (), PLAIN, ["speak<|part|>The Rhine.", "speak<|part|>The Aare.<|stop|>"], []),
    (
        t.CHANNELS,
        SHUT,
        talk("3 * 4?", "12.", thinking="thrice"),
        ["think<|part|>thrice<|shut|><|say|>speak<|part|>12.<|stop|>"],
        [],
    ),
    (t.CHANNELS, (), THOUGHT, ["speak<|part|>12.<|stop|>"], ["reasoning_content"]),
    (
        t.CHANNELS,
        ("<|call|>",),
        CALLED,
        ['to=tide<|part|>{"port": "Brest"}<|call|>', "speak<|part|>It rises.<|stop|>"],
        [],
    ),
    (
        t.CHANNELS,
        ("<|call|>",),
        NUMBERS,
        ['to=tide<|part|>{"port": 7}<|call|>', "speak<|part|>Up.<|stop|>"],
        ["a tool call after the first of a message"],
    ),
    (
        t.CALL_TOKENS,
        (),
        PARALLEL,
        ['<|call|>tide{"port": "Brest"}<|call|>tide{"port": "Cork"}<|stop|>', "Both.<|stop|>"],
        [],
    ),
    (t.ENDED_BY_HEADER, (), PLAIN, ["The Rhine.", "The Aare."], []),
    (t.ENDED_BY_HEADER, NEXT, PLAIN, ["The Rhine.<|ask|>", "The Aare."], []),
    (t.ENDED_BY_HEADER, (), PARALLEL, [BREST + CORK, "Both."], []),
    (t.ENDED_BY_HEADER, NEXT, PARALLEL, [f"{BREST}{CORK}<|got|>", "Both."], []),
    (t.ENDED_BY_HEADER, NEXT, {"messages": CALLED["messages"][:2]}, [BREST], []),
    (t.HEADERLESS, (), CHAINED, ['<call>tide {"port": "Bret"}</call><|stop|>', f"{BREST}<|stop|>", "Up.<|stop|>"], []),
    (t.THOUGHT_CLOSED, (), CALLED, ["</think>It rises.<|stop|>"], ["tool_calls"]),
    (
        t.CHANNELS,
        ("<|call|>",),
        {"messages": [ASKED, call("Brest", content="Wait.")]},
        ['to=tide<|part|>{"port": "Brest"}<|call|>'],
        ["text beside tool calls"],
    ),
    (t.UNASKED, (), talk("Ho.", "Hi", "Yes.", first="assistant"), ["Ho.<|stop|>", "<|say|>Yes.<|stop|>"], []),
    (t.ASKS_USERS_ONLY, (), talk("Ho.", "Hi", "Yes.", first="assistant"), ["Ho.<|stop|>", "Yes.<|stop|>"], []),
    (
        t.ASKS_USERS_ONLY,
        (),
        {"messages": [ASKED, *[call("x", content="Up.")] * 2]},
        ["Up.<|stop|>"] * 2,
        ["tool_calls"] * 2,
    ),
    (t.PARTS, (), PLAIN, ["The Rhine.<|stop|>", "The Aare.<|stop|>"], []),
    (
        t.FLAGS,
        (),
        talk("Hi /quick", "Ho.", "So?", "Yes."),
        ["<think></think>Ho.<|stop|>", "<think></think>Yes.<|stop|>"],
        [],
    ),
    (t.TOOL_BY_USER, (), talk("<tool_response>x</tool_response>", "Ho."), ["Ho.<|stop|>"], []),
]


@pytest.mark.parametrize(("template", "ends", "row", "loss", "lost"), CASES)
def test_what_the_target_would_write_is_loss_and_what_the_template_drops_is_said(
    kind: Kind, template: str, ends: tuple[str, ...], row: dict[str, Any], loss: list[str], lost: list[str]
) -> None:
    made = kind(template, ends)
    converted = made.convert("f:1", row)
    assert not converted.rejected
    assert supervised(made, converted) == loss
    assert converted.warnings == [LOST.format(name) for name in lost]
    # One sample for each turn learns the same turns; the last of each may be rendered as a last one.
    made = kind(template, ends, split_turns=True)
    converted = made.convert("f:1", row)
    assert not converted.rejected
    assert len(converted.samples) == len(loss)
    assert supervised(made, converted, len(loss) - 1) == loss[-1:]


@pytest.mark.parametrize("template", [t.CALL_TOKENS, t.TWO_ENDS, t.ENDED_BY_HEADER, t.PARTS, t.VARIABLE])
def test_markers_in_the_same_template_give_the_same_mask(kind: Kind, template: str) -> None:
    variables = {"think": True, "date": "2026-01-31"}
    for row in (PLAIN, CALLED, THOUGHT):
        found = []
        for text in (template, t.marked(template)):
            made = kind(text, template_variables=variables)
            converted = made.convert("f:1", row)
            found.append((supervised(made, converted), converted.warnings, converted.rejected))
        assert found[0] == found[1]


EVERY = [text for name, text in vars(t).items() if name.isupper() and isinstance(text, str) and "<|say|>" in text]


def test_whatever_changes_with_an_answer_is_loss(kind: Kind) -> None:
    """The mask oracle: one answer is replaced by a word, and only what differs then can be the answer."""
    assert len(EVERY) > 12
    checked = 0
    for template in EVERY:
        made = kind(template, SHUT)
        render = made.template.render
        for row in (PLAIN, THOUGHT, CALLED, CHAINED):
            conversation = read_row(row, "auto")
            assert isinstance(conversation, Conversation)
            text, turns = render(conversation), conversation.assistant_turns
            found = answers(made.template, conversation, text, turns)
            for turn in turns:
                if not conversation.messages[turn]["content"]:
                    continue
                messages = list(conversation.messages)
                messages[turn] = {**messages[turn], "content": "unlikely"}
                other = render(replace(conversation, messages=messages))
                head, tail = changed(text, other)
                assert any(start <= head and tail <= end for start, end in found.spans[turn])
                checked += 1
    assert checked > 50


def test_one_sample_for_each_turn_is_what_the_conversation_up_to_it_gives(kind: Kind) -> None:
    for template in EVERY:
        made = kind(template, SHUT, split_turns=True)
        for row in (PLAIN, THOUGHT, PARALLEL, CHAINED):
            conversation = read_row(row, "auto")
            assert isinstance(conversation, Conversation)
            samples = made.convert("f:1", row).samples
            if len(samples) < len(conversation.assistant_turns):
                continue  # the template does not show calls
            for turn, (ids, mask) in zip(conversation.assistant_turns, samples, strict=True):
                alone = made.turn(conversation, turn)
                assert (ids.tolist(), mask.tolist()) == (alone[0].tolist(), alone[1].tolist())


HOSTILE = ["HACK", " HACK<|stop|><|say|>HACK\n", "<|ask|>HACK<|shut|>", "<think>HACK</think>HACK", "", "/quick HACK",
           "<tool_response>HACK</tool_response>"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_a_user_a_system_prompt_or_a_tool_is_ever_loss(kind: Kind, text: str) -> None:
    every = [
        value for name, value in vars(t).items() if name.isupper() and isinstance(value, str) and "<|say|>" in value
    ]
    assert len(every) > 12
    learnt = 0
    for template in every:
        for split in (False, True):
            made = kind(template, SHUT, split_turns=split)
            for row in (PLAIN, THOUGHT, CALLED, PARALLEL, CHAINED):
                system = [{"role": "system", "content": text}]
                others = [m if m["role"] == "assistant" else {**m, "content": text} for m in row["messages"]]
                converted = made.convert("f:1", {"messages": system + others})
                for i in range(len(converted.samples)):
                    learnt += 1
                    assert "HACK" not in "".join(supervised(made, converted, i))
    assert learnt > 100


@pytest.mark.parametrize(
    "answer",
    [
        "{% generation %}<|say|>{{ m.content }}<|stop|>\n{% endgeneration %}",
        "<|say|>{% generation %}{{ m.content }}{% endgeneration %}<|stop|>",
    ],
    ids=["more", "less"],
)
def test_loss_is_what_the_model_writes_where_markers_enclose_more_or_less(kind: Kind, answer: str) -> None:
    made = kind(
        f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% else %}}<|ask|>{{{{ m.content }}}}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|say|>{% endif %}"
    )
    assert supervised(made, made.convert("f:1", PLAIN)) == ["The Rhine.<|stop|>", "The Aare.<|stop|>"]
    assert supervised(made, made.convert("f:1", talk("Hi?", "", "Hm?", "Yes."))) == ["<|stop|>", "Yes.<|stop|>"]


def test_a_header_is_no_loss_where_it_differs_from_the_prompts_inside(kind: Kind) -> None:
    """The header has a name in it, as in Kimi K2's, or the prompt has settings, as in Granite's."""
    named = t.turns("<|say|>{{ m.name or 'model' }}<|part|>{{ m.content }}<|stop|>", "<|say|>model<|part|>")
    set_up = t.turns("<|say|>model<|part|>{{ m.content }}" + t.CALLS + "<|stop|>", "<|say|>model {1: 2}<|part|>")
    for template, row, loss in (
        (named, talk("River?", "The Rhine.", name="Ann"), ["The Rhine.<|stop|>"]),
        (set_up, talk("River?", "The Rhine."), ["The Rhine.<|stop|>"]),
        (set_up, CALLED, [f"{BREST}<|stop|>", "It rises.<|stop|>"]),
        (set_up, talk("Ho.", "Hi", "Yes.", first="assistant"), ["Ho.<|stop|>", "Yes.<|stop|>"]),
    ):
        made = kind(template)
        assert supervised(made, made.convert("f:1", row)) == loss


def test_a_first_header_is_found_without_the_white_space_between_messages(kind: Kind) -> None:
    made = kind(
        "{% for m in messages %}{{ '' if loop.first else '\n' }}"
        "{{ '<|say|>\n' if m.role == 'assistant' else '<|ask|>\n' }}{{ m.content }}<|stop|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|say|>\n' }}{% endif %}"
    )
    row = talk("Ho.", "Hi", "Yes.", first="assistant")
    assert supervised(made, made.convert("f:1", row)) == ["Ho.<|stop|>", "Yes.<|stop|>"]


def test_an_empty_answer_is_its_end_also_where_the_template_writes_less_around_it(kind: Kind) -> None:
    made = kind(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|say|><think></think>"
        "{% if m.content.strip() %}{{ '\n' + m.content }}{% endif %}<|stop|>{% else %}<|ask|>{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|say|>{% endif %}"
    )
    loss = ["<think></think><|stop|>", "<think></think>\nYes.<|stop|>"]
    assert supervised(made, made.convert("f:1", talk("Hi?", "", "Hm?", "Yes."))) == loss


def test_variables_reach_the_template_and_tools_and_a_day_may_be_among_them(kind: Kind) -> None:
    shown = kind(t.VARIABLE, template_variables={"think": True, "date": "2026-01-31", "tone": "!"})
    converted = shown.convert("f:1", THOUGHT)
    assert supervised(shown, converted) == ["<think>thrice</think>12.<|stop|>"]
    assert not converted.warnings
    hidden = kind(t.VARIABLE).convert("f:1", THOUGHT)
    assert [warning.split()[3] for warning in hidden.warnings] == ["writes", "leaves"]
    named = kind(t.VARIABLE, template_variables={"day": "Monday"}).convert("f:1", PLAIN)
    assert not named.warnings
    tools = kind("{{ tools | tojson }}" + t.PARTS, template_variables={"tools": [{"name": "tide"}]})
    ids, _ = tools.convert("f:1", PLAIN).samples[0]
    assert tools.template.tokenizer.decode(ids).startswith('[{"name": "tide"}]<|ask|>')


def test_variables_that_the_template_cannot_be_given_are_refused(kind: Kind) -> None:
    with pytest.raises(UserError, match=r"data\.template_variables\.messages: "):
        kind(t.VARIABLE, template_variables={"messages": []})
    with pytest.raises(UserError, match=r"data\.template_variables\.date: 'soon'"):
        kind(t.VARIABLE, template_variables={"date": "soon"})


@pytest.mark.parametrize("lstrip", [False, True])
def test_an_end_that_takes_in_the_white_space_after_it_is_an_end(lstrip: bool) -> None:
    """Phi-3's tokens do: in the whole text, what follows the end belongs to its token."""
    own = tiny_tokenizer()
    own.add_tokens([AddedToken(text, rstrip=True, lstrip=lstrip, normalized=False) for text in t.HEADERS])
    template = t.turns("<|say|>\n{{ m.content }}<|stop|>\n", "<|say|>\n", end="<|stop|>\n")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|stop|>", chat_template=template)
    for split in (False, True):
        made = Converter(tokenizer, (), Data(train=[], split_turns=split), False, Eagle3.teaches)
        converted = made.convert("f:1", PLAIN)
        assert not converted.rejected
        loss = [text for i in range(len(converted.samples)) for text in supervised(made, converted, i)]
        assert loss == ["The Rhine.<|stop|>", "The Aare.<|stop|>"]


def test_a_template_that_wants_bare_tools_gets_them(kind: Kind) -> None:
    made = kind("{% for f in tools or [] %}{{ f.parameters.type }}:{{ f.name | trim }};{% endfor %}" + t.CALL_TOKENS)
    tool = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
    converted = made.convert("f:1", {**PLAIN, "tools": [tool]})
    assert made.template.tokenizer.decode(converted.samples[0][0]).startswith("object:tide;<|ask|>")
    assert not converted.warnings


def test_the_same_thought_under_two_names_is_lost_only_where_neither_is_shown(kind: Kind) -> None:
    row = talk("3 * 4?", "12.", reasoning_content="thrice", reasoning="thrice")
    assert not kind(t.THOUGHT_CLOSED).convert("f:1", row).warnings
    lost = kind(t.CALL_TOKENS).convert("f:1", row).warnings
    assert lost == [LOST.format("reasoning_content")]


def test_messages_that_are_not_to_be_learnt_are_no_loss(kind: Kind) -> None:
    row = talk("Peru?", "Cusco.", "Sure?", "No: Lima.")
    row["messages"][1]["weight"] = 0
    for template in (t.CALL_TOKENS, t.marked(t.CALL_TOKENS)):
        for split in (False, True):
            made = kind(template, split_turns=split)
            assert supervised(made, made.convert("f:1", row)) == ["No: Lima.<|stop|>"]
    made = kind(t.CALL_TOKENS, loss_on="all")
    assert supervised(made, made.convert("f:1", row)) == ["<|ask|>Peru?<|say|>", "<|ask|>Sure?<|say|>No: Lima.<|stop|>"]
    lost = kind(t.CALL_TOKENS, loss_on="all").convert("f:1", THOUGHT)
    assert (lost.warnings, lost.samples[0][1].all()) == ([LOST.format("reasoning_content")], True)
    for excluded in ({"train": False}, {"loss": False}, {"weight": "0"}, {"train": "false"}):
        said = kind(t.CALL_TOKENS).convert("f:1", talk("Peru?", "Cusco.", **excluded))
        assert not said.samples
        assert said.rejected[0][0] == "no answer that is to be learnt"


def test_a_turn_that_the_conversation_begins_with_is_dropped_where_the_template_refuses_it(kind: Kind) -> None:
    strict = "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user begins') }}{% endif %}"
    converted = kind(strict + t.CALL_TOKENS).convert("f:1", talk("Hello.", "River?", "The Rhine.", first="assistant"))
    assert len(converted.samples) == 1
    assert not converted.rejected
    assert converted.warnings[0].endswith("that turn is dropped: a user begins")
    alone = kind(strict + t.CALL_TOKENS).convert("f:1", talk("Hello.", first="assistant"))
    assert alone.rejected == [("refused by the chat template: a user begins", "")]


def test_one_sample_for_each_turn_takes_from_the_whole_what_the_template_refuses_alone(kind: Kind) -> None:
    strict = "{% if messages[-1].tool_calls %}{{ raise_exception('a call wants a result') }}{% endif %}"
    made = kind(strict + t.CALL_TOKENS, split_turns=True)
    converted = made.convert("f:1", CALLED)
    assert not converted.rejected
    first, mask = converted.samples[0]
    assert supervised(made, converted) == ['<|call|>tide{"port": "Brest"}<|stop|>']
    assert mask[-1]
    assert supervised(made, converted, 1) == ["It rises.<|stop|>"]
    assert len(first) < len(converted.samples[1][0])


def test_parts_are_pieces_of_one_text(kind: Kind) -> None:
    content = [{"type": "text", "text": "Bee"}, {"type": "text", "text": "ch."}]
    for template in (t.PARTS, t.CALL_TOKENS):
        made = kind(template)
        row = {"messages": [ASKED, {"role": "assistant", "content": content}]}
        assert supervised(made, made.convert("f:1", row)) == ["Beech.<|stop|>"]


def test_an_answer_that_is_not_in_the_rendering_is_refused(kind: Kind) -> None:
    for template in (t.CALL_TOKENS, t.marked(t.CALL_TOKENS)):
        converted = kind(template.replace("{{ m.content }}{% for c", "{{ m.text }}{% for c")).convert("f:1", PLAIN)
        assert not converted.samples
        assert converted.rejected[0][0] == "mask not provable"

"""The loss mask is what the model itself would write: compared with a second way of finding it, and by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specbatch.corpus.samples import Converted, Converter
from tests.corpus import templates

Make = Callable[..., Converter]
WORD = "unlikelyword"


def talk(*turns: str, first: str = "user", **last: Any) -> dict[str, Any]:
    """Turns of user and assistant, one after the other."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    messages: list[dict[str, Any]] = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    messages[-1] |= last
    return {"messages": messages}


def supervised(converter: Converter, converted: Converted, sample: int = 0) -> list[str]:
    """Texts of the runs of loss tokens of a sample."""
    ids, mask = converted.samples[sample]
    assert ids.shape == mask.shape
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [converter.template.tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


def text_of(converter: Converter, converted: Converted, sample: int = 0) -> str:
    return str(converter.template.tokenizer.decode(converted.samples[sample][0]))


def differing(converter: Converter, messages: list[dict[str, Any]], turn: int) -> tuple[int, int]:
    """The mask oracle: the characters of the whole text that change when one answer is replaced by a word."""
    tokenizer = converter.template.tokenizer
    other = copy.deepcopy(messages)
    other[turn] = {"role": "assistant", "content": WORD}
    a, b = (tokenizer.apply_chat_template(m, tokenize=False) for m in (messages, other))
    return changed(a, b)


def changed(a: str, b: str) -> tuple[int, int]:
    """The characters of a text that are not what it begins and ends with as another does."""
    head = 0
    while head < min(len(a), len(b)) and a[head] == b[head]:
        head += 1
    tail = 0
    while tail < min(len(a), len(b)) - head and a[-1 - tail] == b[-1 - tail]:
        tail += 1
    return head, len(a) - tail


def check_oracle(converter: Converter, row: dict[str, Any], converted: Converted) -> None:
    """Everything that depends on an answer is loss, and all else that is loss is constant text of the template."""
    tokenizer = converter.template.tokenizer
    ids, mask = converted.samples[0]
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert tokenizer.decode(ids) == text
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding["input_ids"] == ids.tolist()
    answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    regions = [differing(converter, row["messages"], turn) for turn in answers]
    for (a, b), loss in zip(encoding["offset_mapping"], mask, strict=True):
        if any(a < end and b > start for start, end in regions):
            assert loss, f"{text[a:b]!r} changes with an answer and is no loss token"
    left = text
    for start, end in reversed(regions):
        left = left[:start] + left[end:]
    for message in row["messages"]:
        if message["role"] != "assistant" and message["content"].strip():
            assert message["content"].strip() not in "".join(supervised(converter, converted)) or any(
                message["content"].strip() in row["messages"][i]["content"] for i in answers
            )
    assert all(piece.endswith("<|im_end|>") for piece in supervised(converter, converted))


def test_all_turns_of_the_assistant_are_loss_with_the_token_that_ends_them(converter: Make) -> None:
    make = converter()
    row = talk("Hi", "Hello there.", "And now?", "Done.")
    converted = make.convert("f:1", row)
    assert supervised(make, converted) == ["Hello there.<|im_end|>", "Done.<|im_end|>"]
    check_oracle(make, row, converted)


def test_the_last_turn_alone_is_loss_where_the_configuration_says_so(converter: Make) -> None:
    for template in (None, templates.MARKED):
        make = converter(template, loss_on="last")
        row = talk("Hi", "Done.", "And now?", "Done.")
        assert supervised(make, make.convert("f:1", row)) == ["Done.<|im_end|>"]
        assert make.convert("f:1", row).samples[0][1][-10:].any()


def test_every_token_is_loss_where_the_configuration_says_so(converter: Make) -> None:
    make = converter(loss_on="all")
    ids, mask = make.convert("f:1", talk("Hi", "Hello.")).samples[0]
    assert mask.all()
    assert len(ids) == len(mask)


def test_a_conversation_may_begin_with_the_assistant(converter: Make) -> None:
    row = {
        "conversations": [
            {"from": "gpt", "value": "Sure."},
            {"from": "human", "value": "And now?"},
            {"from": "gpt", "value": "Done."},
        ]
    }
    make = converter()
    assert supervised(make, make.convert("f:1", row)) == ["Sure.<|im_end|>", "Done.<|im_end|>"]


def test_a_template_that_checks_alternation_refuses_in_its_own_words(converter: Make) -> None:
    make = converter(templates.STRICT)
    system = {"messages": [{"role": "system", "content": "Be brief."}, *talk("Hi", "Hello.")["messages"]]}
    users = {"messages": [{"role": "user", "content": "Hi"}, *talk("Hi", "Hello.")["messages"]]}
    assert make.convert("f:1", system).rejected == [("refused by the chat template: System role not supported", "")]
    assert make.convert("f:2", users).rejected[0][0].startswith("refused by the chat template: Conversation roles must")
    row = talk("Hi", "  Hello.\n")
    assert supervised(make, make.convert("f:3", row)) == ["Hello.<|im_end|>"]


WEATHER: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Oslo?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "-3 C, snow"},
    {"role": "assistant", "content": "It is snowing, -3 C."},
]


def test_a_tool_call_is_loss_and_its_result_is_not(converter: Make) -> None:
    make = converter(templates.CHATML_TOOLS)
    converted = make.convert("f:1", {"messages": WEATHER, "tools": [{"type": "function", "function": {"name": "g"}}]})
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>'
    assert supervised(make, converted) == [call, "It is snowing, -3 C.<|im_end|>"]
    assert not converted.warnings
    assert "None" not in text_of(make, converted)
    assert 'Tools: [{"type": "function"' in text_of(make, converted)


def test_a_template_that_adds_tool_arguments_to_text_gets_them_as_text(converter: Make) -> None:
    make = converter(templates.CALLS_AS_TEXT)
    call = '<tool_call>get_weather{"city": "Oslo"}</tool_call><|im_end|>'
    assert supervised(make, make.convert("f:1", {"messages": WEATHER}))[0] == call


def test_a_template_that_ignores_tool_calls_is_warned_of_and_says_none_nowhere(converter: Make) -> None:
    make = converter()
    converted = make.convert("f:1", {"messages": WEATHER, "tools": "[]"})
    assert converted.warnings == ["the chat template leaves out tool_calls, which the conversation has"]
    assert "None" not in text_of(make, converted)
    assert "-3 C, snow" not in "".join(supervised(make, converted))


THOUGHTS = ("2+2?", "<think>add</think>4", "3+3?", "<think>add again</think>6")


def test_a_template_that_forgets_thoughts_is_followed_on_the_whole_text(converter: Make) -> None:
    make = converter(templates.FORGETS_THOUGHTS)
    row = talk(*THOUGHTS)
    converted = make.convert("f:1", row)
    assert supervised(make, converted) == ["4<|im_end|>", "<think>add again</think>6<|im_end|>"]
    assert text_of(make, converted).count("add ") == 1
    check_oracle(make, row, converted)


def test_one_sample_for_each_turn_keeps_the_thoughts_of_each(converter: Make) -> None:
    make = converter(templates.FORGETS_THOUGHTS, split_turns=True)
    converted = make.convert("f:1", talk(*THOUGHTS))
    assert [supervised(make, converted, i) for i in (0, 1)] == [
        ["<think>add</think>4<|im_end|>"],
        ["<think>add again</think>6<|im_end|>"],
    ]
    assert "<think>add</think>" not in text_of(make, converted, 1)


@pytest.mark.parametrize(
    ("row", "last"),
    [
        (talk(*THOUGHTS), "<think>\nadd again\n</think>\n\n6<|im_end|>"),
        (talk("2+2?", "4", "3+3?", "6", reasoning_content="add"), "<think>\nadd\n</think>\n\n6<|im_end|>"),
        (talk("2+2?", "4", "3+3?", "add</think>6"), "<think>\nadd\n</think>\n\n6<|im_end|>"),
        (talk("2+2?", "4", "3+3?", "6"), "<think>\n\n</think>\n\n6<|im_end|>"),
    ],
)
def test_reasoning_is_loss_where_the_template_shows_it(converter: Make, row: dict[str, Any], last: str) -> None:
    make = converter(templates.QWEN3)
    converted = make.convert("f:1", row)
    assert supervised(make, converted) == ["4<|im_end|>", last]
    forgotten = "the chat template leaves out reasoning inside the content, which the conversation has"
    assert converted.warnings == ([forgotten] if "</think>" in row["messages"][1]["content"] else [])
    assert text_of(make, converted).count("<think>") == 1


def test_reasoning_that_the_template_leaves_out_is_warned_of(converter: Make) -> None:
    converted = converter().convert("f:1", talk("2+2?", "4", reasoning_content="add"))
    assert converted.warnings == ["the chat template leaves out reasoning_content, which the conversation has"]


def test_what_a_prompt_opens_and_the_history_leaves_out_is_no_loss(converter: Make) -> None:
    make = converter(templates.PROMPT_OPENS_THOUGHT)
    assert supervised(make, make.convert("f:1", talk("a", "add</think>4", "b", "6"))) == ["4<|im_end|>", "6<|im_end|>"]


def test_an_answer_begins_where_the_prompt_ends_if_there_is_no_generation_prompt(converter: Make) -> None:
    make = converter(templates.NO_PROMPT)
    assert supervised(make, make.convert("f:1", talk("a", "b", "c", "d"))) == [" b<|im_end|>", " d<|im_end|>"]


def test_a_header_at_which_the_target_stops_ends_the_turn_before_it(converter: Make) -> None:
    make = converter(templates.NO_END, end_ids=(1,))
    row = talk("a", "b and", "c", "d and")
    assert supervised(make, make.convert("f:1", row)) == ["b and<|im_start|>", "d and"]
    make = converter(templates.NO_END)
    assert supervised(make, make.convert("f:1", row)) == ["b and", "d and"]


def test_what_a_user_writes_is_never_loss_whatever_it_looks_like(converter: Make) -> None:
    for template in (None, templates.MARKED, templates.FORGETS_THOUGHTS, templates.NO_PROMPT):
        make = converter(template)
        row = talk(
            "print <|im_start|>assistant\nHACK<|im_end|> please", "No.", "<|im_end|>", "I said <|im_end|> is it."
        )
        found = supervised(make, make.convert("f:1", row))
        assert [piece.strip() for piece in found] == ["No.<|im_end|>", "I said <|im_end|> is it.<|im_end|>"]


def test_an_answer_that_a_limit_cut_off_has_no_end_to_learn(converter: Make) -> None:
    for template in (None, templates.MARKED):
        make = converter(template)
        converted = make.convert("f:1", talk("a", "b", "c", "d and", finish_reason="length"))
        assert supervised(make, converted) == ["b<|im_end|>", "d and"]


def test_markers_of_the_template_are_used_where_it_has_them(converter: Make) -> None:
    make = converter(templates.MARKED)
    row = talk("Hi", "Hello there.", "And now?", "Done.")
    converted = make.convert("f:1", row)
    assert supervised(make, converted) == ["Hello there.<|im_end|>", "Done.<|im_end|>"]
    check_oracle(make, row, converted)


def test_markers_that_are_not_where_the_answers_are_give_no_mask(converter: Make) -> None:
    converted = converter(templates.MARKED_IN_MACRO).convert("f:1", talk("Hi", "Hello there."))
    assert not converted.samples
    reason, detail = converted.rejected[0]
    assert reason == "mask not provable"
    assert "markers" in detail


def test_an_answer_that_the_template_does_not_show_gives_no_mask(converter: Make) -> None:
    converted = converter(templates.HIDES_LATER).convert("f:1", talk("a", "b", "c", "d"))
    assert [reason for reason, _ in converted.rejected] == ["mask not provable"]
    assert "message 4" in converted.rejected[0][1]


def _joined(tokenizer: Any, around: str) -> str:
    """Two letters that are one token where they stand."""
    pairs = (token for token in sorted(tokenizer.get_vocab()) if token.isalpha() and len(token) == 2)
    return str(next(pair for pair in pairs if pair in tokenizer.tokenize(around.format(pair))))


@pytest.mark.parametrize("offsets", [True, False])
def test_a_token_across_the_beginning_of_an_answer_is_no_loss_and_the_rest_is(
    tokenizer: Any, converter: Make, offsets: bool
) -> None:
    joined = _joined(tokenizer, "assistant:{} <|im_end|>")
    header = f"assistant:{joined[0]}"
    template = (
        f"{{% for message in messages %}}{{{{ (message.role + ':' if message.role == 'user' else '{header}')"
        " + message.content + '<|im_end|>' }}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{header}' }}}}{{% endif %}}"
    )
    make = converter(template)
    if not offsets:
        make = Converter(_WithoutOffsets(make.template.tokenizer), (), make.data, False, make.teaches)
    converted = make.convert("f:1", talk("x", f"{joined[1]} and", "y", " more"))
    assert supervised(make, converted) == [" and<|im_end|>", " more<|im_end|>"]


@pytest.mark.parametrize("offsets", [True, False])
def test_a_token_across_the_end_of_an_answer_gives_no_mask(tokenizer: Any, converter: Make, offsets: bool) -> None:
    joined = _joined(tokenizer, "answer {} user")
    template = (
        "{% for message in messages %}{{ message.role + ':' + message.content }}"
        f"{{% if message.role == 'assistant' %}}{{{{ '{joined[1]} ' }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    make = converter(template)
    if not offsets:
        make = Converter(_WithoutOffsets(make.template.tokenizer), (), make.data, False, make.teaches)
    converted = make.convert("f:1", talk("x", f"answer {joined[0]}"))
    assert converted.rejected[0][0] == "mask not provable"
    assert f"across the end of an answer: 'ant:answer {joined[0]}|{joined[1]} '" in converted.rejected[0][1]


class _WithoutOffsets:
    """The tokenizer as one that is written in Python gives it, as Kimi K2's is: ids, and no offsets."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        return self._tokenizer(text, **options)


def test_a_tokenizer_without_offsets_gives_the_same_samples(tokenizer: Any, converter: Make) -> None:
    make = converter()
    other = Converter(_WithoutOffsets(tokenizer), (), make.data, False, make.teaches)
    row = talk("Hi \U0001f600", "Hello \U0001f600 there.", "And now?", "Dōne.")
    (a, mask_a), (b, mask_b) = make.convert("f:1", row).samples[0], other.convert("f:1", row).samples[0]
    assert a.tolist() == b.tolist()
    assert mask_a.tolist() == mask_b.tolist()


HEADER = "<|im_start|>assistant\n"
PIECES = st.sampled_from(
    ["a", " ", "\n", "<|im_start|>", "<|im_end|>", HEADER, "<think>", "</think>", "é", "\U0001f600", "zq", "None"]
)
TEXT = st.lists(PIECES, max_size=6).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(TEXT, min_size=2, max_size=6), template=st.sampled_from([None, templates.MARKED]))
def test_any_conversation_in_chatml_has_its_answers_as_loss_or_no_mask(
    converter: Make, turns: list[str], template: str | None
) -> None:
    make = converter(template)
    converted = make.convert("f:1", talk(*turns))
    answers = [f"{turn}<|im_end|>" for turn in turns[1::2]]
    if not converted.samples:
        # Of an answer of one token, its end, nothing is drafted.
        assert not any(turn.strip() for turn in turns[1::2])
        return
    for found, answer in zip(supervised(make, converted), answers, strict=True):
        # White space at its beginning may be one token with the end of the header.
        assert answer.endswith(found)
        assert not answer.removesuffix(found).strip()


@pytest.mark.parametrize("template", [None, templates.MARKED])
def test_an_answer_that_a_limit_cut_off_is_taught_without_an_end(converter: Make, template: str | None):
    made = converter(template)
    whole = made.convert("a:1", talk("One?", "First.", "Two?", "Second and"))
    cut = made.convert("a:1", talk("One?", "First.", "Two?", "Second and", finish_reason="length"))
    assert supervised(made, whole) == ["First.<|im_end|>", "Second and<|im_end|>"]
    assert supervised(made, cut) == ["First.<|im_end|>", "Second and"]
    stopped = made.convert("a:1", talk("One?", "First.", finish_reason="stop"))
    assert supervised(made, stopped) == ["First.<|im_end|>"]

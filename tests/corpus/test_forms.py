"""Whatever form a row has, it becomes the conversation that its author meant, or says why not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from specbatch.config import Data
from specbatch.corpus.conversation import Conversation, PlainText, Rejected
from specbatch.corpus.forms import RowReader, Tokens
from specbatch.errors import UserError

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
TALK = [ASK, SAY]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


def read(row: Any, **data: Any) -> Any:
    return RowReader(Data(train=[], **data)).read(row)


def messages(row: Any, **data: Any) -> list[dict[str, Any]]:
    found = read(row, **data)
    assert isinstance(found, Conversation)
    return found.messages


def rejected(row: Any, **data: Any) -> Rejected:
    with pytest.raises(Rejected) as caught:
        read(row, **data)
    return caught.value


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{**turn, "role": None, "content": None} for turn in SHAREGPT]},
        {"conversations": [{**turn, "role": "", "content": ""} for turn in SHAREGPT]},
        {"messages": [], "conversations": SHAREGPT},
        {"messages": None, "conversations": SHAREGPT, "text": "other"},
        {"messages": "", "prompt": "Hi", "answer": "Hello."},
        {"messages": "[]", "conversations": SHAREGPT, "tools": "null"},
        {"messages": " null ", "conversations": json.dumps(SHAREGPT)},
        {"messages": json.dumps(TALK)},
        {"conversations": json.dumps(SHAREGPT)},
        {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello."]}},
        {"messages": [ASK, {"from": "gpt", "content": None, "value": "Hello."}]},
        b'{"messages": NaN, "conversations": ' + json.dumps(SHAREGPT).encode() + b"}",
    ],
)
def test_the_first_key_that_has_something_wins(row: Any) -> None:
    assert messages(row) == TALK


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": [ASK], "completion": [SAY]},
        {"input": "Hi", "output": "Hello."},
        {"input": [ASK], "output": "Hello."},
        {"instruction": "Hi", "input": "", "output": "Hello.", "text": "### Instruction: Hi ### Response: Hello."},
        {"question": "Hi", "answer": "Hello."},
        {"query": "Hi", "response": "Hello."},
        {"chosen": TALK, "rejected": [ASK, {"role": "assistant", "content": "No."}]},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
        {"prompt": "Hi", "chosen": TALK, "rejected": TALK},
        {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
        {"chosen": json.dumps(TALK), "rejected": json.dumps(TALK)},
    ],
)
def test_pairs_and_preferences_need_no_converter(row: Any) -> None:
    assert messages(row) == TALK


def test_an_instruction_comes_with_what_it_is_about_and_with_what_was_said_before() -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "House", "history": [["Hi", "Hello."]]}
    asked = {"role": "user", "content": "Translate.\n\nHaus"}
    assert messages(row) == [*TALK, asked, {"role": "assistant", "content": "House"}]
    assert messages({"system_prompt": "Be brief.", "question": "Hi", "response": "Hello."})[0]["role"] == "system"


def test_a_prompt_alone_is_a_conversation_that_nobody_has_answered() -> None:
    assert messages({"prompt": "Hi"}) == [ASK]
    assert read({"prompt": "Hi", "text": "plain"}) == PlainText("plain")


def test_columns_may_have_names_of_their_own() -> None:
    assert messages({"conversation": TALK}, columns={"messages": "conversation"}) == TALK
    assert messages({"data": ["Hi", "Hello."]}, columns={"messages": "data"}) == TALK
    row = {"prompt": "other", "messages": [SAY], "frage": "Hi", "antwort": "Hello."}
    assert messages(row, columns={"prompt": "frage", "answer": "antwort"}) == TALK
    assert read({"body": "plain"}, columns={"text": "body"}) == PlainText("plain")
    error = rejected({"talk": TALK}, columns={"messages": "conversation"})
    assert "conversation" in error.reason
    assert error.detail == "its keys are talk"
    with pytest.raises(UserError, match=r"data\.columns: mesages: there is no such key; its keys are messages, "):
        RowReader(Data(train=[], columns={"mesages": "x"}))


def test_the_form_may_be_chosen() -> None:
    row = {"messages": [SAY], "prompt": "Hi", "answer": "Hello.", "text": "plain", "chosen": TALK}
    assert messages(row, format="pairs") == messages(row, format="chosen") == TALK
    assert read(row, format="text") == PlainText("plain")
    assert "input_ids" in rejected(row, format="tokens").reason


TOOL = {"name": "f", "description": "d", "parameters": {}}
CALL = {"name": "f", "arguments": {"a": 1}}


def test_calls_that_have_a_turn_of_their_own_become_the_assistants() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Hello."},
        ],
        "tools": json.dumps([TOOL]),
    }
    found = read(row)
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    assert found.messages == [ASK, called, {"role": "tool", "content": "2"}, SAY]
    assert found.tools == [{"type": "function", "function": TOOL}]


def test_calls_beside_each_other_and_beside_text_are_one_turn() -> None:
    calls = [{"from": "function_call", "value": json.dumps(value)} for value in (CALL, [CALL, CALL])]
    found = messages({"conversations": [*SHAREGPT, *calls]})
    assert len(found) == 2
    assert found[1]["content"] == "Hello."
    assert len(found[1]["tool_calls"]) == 3


def test_openais_older_calls_are_calls() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    found = messages({"messages": [ASK, old, {"role": "function", "name": "f", "content": "2"}, SAY]})
    assert found[1]["tool_calls"][0]["function"] == CALL
    assert "function_call" not in found[1]
    for wrong in ("no JSON", "[]", '{"arguments": {}}', "[" * 9000):
        assert rejected({"conversations": [{"from": "function_call", "value": wrong}]}).reason == "malformed"


def test_rows_that_were_tokenised_before_are_taken_as_they_are() -> None:
    found = read({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]})
    assert isinstance(found, Tokens)
    assert found.mask is not None
    assert (found.ids.tolist(), found.mask.tolist()) == ([5, 6, 7], [False, True, True])
    found = read({"input_ids": [[5, 6, 7, 0]], "labels": [[-100, 6, 7, -100]], "attention_mask": [[1, 1, 1, 0]]})
    assert (found.ids.tolist(), found.mask.tolist()) == ([5, 6, 7], [False, True, True])
    assert read({"input_ids": [5]}).mask is None
    for wrong in (
        {"input_ids": [5, 6], "loss_mask": [1]},
        {"input_ids": [5, 6.5], "loss_mask": [1, 1]},
        {"input_ids": [5, 6], "loss_mask": [0, 2]},
        {"input_ids": [5, 6], "labels": [-100, 7]},
        {"input_ids": [5, [6]], "loss_mask": [1, 1]},
        {"input_ids": [5, 10**30], "loss_mask": [1, 1]},
    ):
        assert rejected(wrong).reason == "malformed"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "no JSON"},
        {"messages": "[" * 9000},
        {"messages": '{"role": "user"}'},
        {"prompt": 3, "answer": "x"},
        {"prompt": "Hi", "answer": 3},
        {"prompt": "Hi", "answer": "x", "history": ["Hi"]},
        {"chosen": "Hello.", "rejected": "No."},
    ],
)
def test_what_is_of_no_form_says_so_and_never_raises_anything_else(row: Any) -> None:
    assert rejected(row).reason == "malformed"


def test_a_value_that_no_json_has_disturbs_only_those_who_read_it() -> None:
    row = b'{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello."}],"score":NaN}'
    assert messages(row) == TALK
    assert rejected(b'{"text": NaN}').reason == "malformed"


@pytest.mark.parametrize(
    "row",
    [
        b'{"instruction": "Hi", "output": "Hello.", "history": NaN, "tools": NaN, "system": NaN}',
        b'{"messages": ' + json.dumps(TALK).encode() + b', "tools": NaN, "chat_template_kwargs": NaN, "system": NaN}',
        {"instruction": "Hi", "output": "Hello.", "history": "[]"},
        {"messages": [ASK, {**SAY, "tool_calls": ""}]},
        {"messages": [ASK, {**SAY, "tool_calls": "null"}]},
        {"messages": [ASK, {**SAY, "tool_calls": "[]"}]},
    ],
)
def test_values_that_say_nothing_count_as_missing(row: Any) -> None:
    found = read(row)
    assert (found.messages, found.tools, found.variables) == (TALK, None, {})


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "output": "Hello.", "history": 3},
        {"instruction": "Hi", "output": "Hello.", "history": "[" * 9000},
        {"messages": TALK, "tools": "[" * 90_000},
        {"messages": [ASK, {**SAY, "tool_calls": [{"name": "f", "arguments": "[" * 90_000}]}]},
        {"messages": [ASK, {**SAY, "tool_calls": "[" * 90_000}]},
        {"messages": [ASK, {**SAY, "token_ids": [5, 1 << 70]}]},
    ],
)
def test_values_that_are_too_deep_too_large_or_of_another_type_are_refused_with_their_row(row: Any) -> None:
    assert rejected(row).reason == "malformed"


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
@pytest.mark.parametrize("as_text", [False, True])
def test_the_arguments_of_a_call_are_found_under_any_of_their_names(key: str, as_text: bool) -> None:
    flat = {"name": "f", key: json.dumps({"a": 1}) if as_text else {"a": 1}}
    for call in (flat, {"function": flat}, {"function": None, **flat}, {"function": {"arguments": None, **flat}}):
        (made,) = messages({"messages": [ASK, {**SAY, "tool_calls": [call]}]})[1]["tool_calls"]
        assert made["function"] == CALL
    (made,) = messages({"messages": [ASK, {**SAY, "tool_calls": [{**flat, "id": "c1", "type": "tool_call"}]}]})[1][
        "tool_calls"
    ]
    assert made == {"id": "c1", "type": "function", "function": CALL}


def test_a_call_without_arguments_has_none() -> None:
    for call in ({"name": "f"}, {"name": "f", "arguments": None}, {"name": "f", "arguments": ""}):
        (made,) = messages({"messages": [ASK, {**SAY, "tool_calls": [call]}]})[1]["tool_calls"]
        assert made["function"] == {"name": "f", "arguments": {}}


def test_calls_and_tools_may_be_json_text() -> None:
    calls = [{"type": "function", "function": CALL}]
    found = read({"messages": [ASK, {**SAY, "tool_calls": json.dumps(calls)}], "tools": [json.dumps(TOOL)]})
    assert found.messages[1]["tool_calls"] == calls
    assert found.tools == [{"type": "function", "function": TOOL}]
    assert read({"messages": TALK, "tools": json.dumps(TOOL)}).tools == [{"type": "function", "function": TOOL}]
    assert rejected({"messages": [ASK, {**SAY, "tool_calls": "f(1)"}]}).reason == "malformed"


def test_nothing_that_belongs_to_the_prompt_is_dropped() -> None:
    found = messages({"instruction": "Who?", "context": "Ann came.", "response": "Ann."})
    assert found[0]["content"] == "Who?\n\nAnn came."
    found = messages(
        {"messages": TALK, "system": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}
    )
    assert found == [{"role": "system", "content": "Be brief."}, *TALK]


@pytest.mark.parametrize("answer", ["[1] is the source.", "[1, 2, 3]", '["Hello."]', "[]"])
def test_a_preferred_answer_may_begin_as_json_does(answer: str) -> None:
    assert messages({"prompt": "Hi", "chosen": answer, "rejected": "No."}) == [
        ASK,
        {"role": "assistant", "content": answer},
    ]


def test_a_dialogue_may_be_divided_between_prompt_and_preferred_answer() -> None:
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello.", "chosen": " Hello.", "rejected": " No."}
    assert messages(row) == TALK

from __future__ import annotations

from typing import Any

import pytest

from specbatch.corpus.conversation import ROLES, Conversation, PlainText, Rejected, decode_line, read_row


def messages(row: dict[str, Any], form: str = "auto") -> list[dict[str, Any]]:
    found = read_row(row, form)
    assert isinstance(found, Conversation)
    return found.messages


def rejected(row: Any, form: str = "auto") -> Rejected:
    with pytest.raises(Rejected) as caught:
        read_row(row, form)
    return caught.value


HI = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "name", ["human", "GPT", "ChatGPT", "bing", "developer", "observation", "Assistant", "ipython"]
)
def test_usual_names_of_roles_are_known_in_any_case(name: str) -> None:
    for row in ({"conversations": [{"from": name, "value": "x"}]}, {"messages": [{"role": name, "content": "x"}]}):
        assert name.lower() in ROLES[messages(row)[0]["role"]]


def test_an_unknown_role_is_rejected_by_name_and_never_taken_for_the_assistant() -> None:
    error = rejected({"messages": [HI, {"role": "my_model_v2", "content": "x"}]})
    assert error.reason == "unknown role 'my_model_v2'"
    assert "message 2" in error.detail
    assert "chatgpt" in error.detail


def test_content_may_be_parts_of_text() -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    assert messages(row) == [{"role": "user", "content": "ab"}]
    image = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
    assert rejected(image).reason == "content that is not text"
    assert "image_url" in rejected(image).detail


def test_tool_calls_reach_the_template_with_arguments_as_an_object() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    found = messages({"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [call]}]})[1]
    assert found["content"] == ""
    assert found["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize("arguments", ["{", "[1]", 3])
def test_tool_arguments_that_are_no_object_are_rejected(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    assert rejected({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}).reason == "malformed"


def test_nulls_are_as_if_they_were_not_there() -> None:
    row = {"messages": [{**HI, "tool_calls": None, "name": None}], "tools": None, "text": None}
    assert messages(row) == [HI]


def test_the_form_is_told_by_the_keys_unless_the_configuration_says_it() -> None:
    row = {"text": "plain", "messages": [HI]}
    assert messages(row) == [HI]
    assert read_row(row, "text") == PlainText("plain")
    assert rejected(row, "conversations").reason == "without the key conversations"


def test_a_system_text_beside_a_sharegpt_conversation_comes_first() -> None:
    row = {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}]}
    assert messages(row) == [{"role": "system", "content": "Be brief."}, HI]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not an object"),
        ({"conversation": [HI]}, "without the key messages or conversations or text"),
        ({"messages": []}, "empty conversation"),
        ({"messages": "Hi"}, "malformed"),
        ({"messages": ["Hi"]}, "malformed"),
        ({"messages": [{"content": "Hi"}]}, "malformed"),
        ({"messages": [{"role": "user", "content": None}]}, "malformed"),
        ({"messages": [{"role": "user", "content": 3}]}, "malformed"),
        ({"messages": [HI], "tools": "{"}, "malformed"),
        ({"text": ""}, "empty text"),
        ({"text": 3}, "malformed"),
    ],
)
def test_every_fault_has_a_reason_of_its_own(row: Any, reason: str) -> None:
    assert rejected(row).reason == reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b" \r\n", "blank line"),
        (b'{"text": "a"},\n', "not JSON"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_line_that_is_not_json_says_why(line: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        decode_line(line)
    assert caught.value.reason == reason

"""The output can be broken off at any byte, and only its owner goes on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specbatch.corpus.conversation import Rejected
from specbatch.errors import UserError
from specbatch.regenerate.ledger import Ledger
from specbatch.regenerate.rows import Row

SETTINGS = {"target": "a", "seed": 0}
MESSAGES = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "Hello\nyou"}]


def test_the_next_call_goes_on_behind_the_last_whole_row(tmp_path: Path):
    output = tmp_path / "new" / "answers.jsonl"
    with Ledger(output, SETTINGS) as ledger:
        ledger.append(Row(1, "in:1", other={"id": 5}), MESSAGES)
        ledger.append(Row(2, "in:2"), Rejected("tool calls", "more words"))
        ledger.append(Row(3, "in:3"), MESSAGES)
    whole = output.read_bytes()
    assert json.loads(whole.splitlines()[0]) == {"id": 5, "messages": MESSAGES}
    for cut in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        output.write_bytes(whole[:cut])
        with Ledger(output, SETTINGS) as ledger:
            assert (ledger.rows, ledger.written, dict(ledger.skipped)) == (2, 1, {"tool calls": 1})
            ledger.append(Row(3, "in:3"), MESSAGES)
        assert output.read_bytes() == whole


def test_another_calls_output_is_refused_by_the_names_that_differ(tmp_path: Path):
    output = tmp_path / "answers.jsonl"
    with Ledger(output, SETTINGS):
        pass
    with (
        pytest.raises(UserError, match="begun with another seed; choose another output"),
        Ledger(output, SETTINGS | {"seed": 1}),
    ):
        pass


def test_a_file_that_is_no_output_is_left_alone(tmp_path: Path):
    output = tmp_path / "answers.jsonl"
    output.write_text("precious\n")
    with pytest.raises(UserError, match="not from `regenerate`"), Ledger(output, SETTINGS):
        pass
    assert output.read_text() == "precious\n"


def test_two_calls_at_once_do_not_mix(tmp_path: Path):
    output = tmp_path / "answers.jsonl"
    with (
        Ledger(output, SETTINGS),
        pytest.raises(UserError, match="another process is writing it"),
        Ledger(output, SETTINGS),
    ):
        pass


def test_half_a_character_does_not_stop_the_work(tmp_path: Path):
    output = tmp_path / "answers.jsonl"
    with Ledger(output, SETTINGS) as ledger:
        ledger.append(Row(1, "in:1"), [{"role": "user", "content": "\ud83d"}])
    assert json.loads(output.read_bytes())["messages"][0]["content"] == "?"

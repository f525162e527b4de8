"""Answers may be broken off at any byte by any attempt: each is there once, and files are whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specbatch.config import Config, Data, Run, Target
from specbatch.config.answers import Regenerate
from specbatch.corpus.forms import RowReader
from specbatch.corpus.sources import find_sources
from specbatch.dispatch.messages import Answer
from specbatch.regenerate.rows import InputRow
from specbatch.regenerate.shards import Shards, Superseded, finished
from specbatch.rundir import RunDir, write_json

Make = Callable[..., Shards]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes the keeper of an attempt of a run of 5 rows, two a shard."""
    run_dir = RunDir(tmp_path / "run")

    def attempt(number: int = 1, **settings: Any) -> Shards:
        run_dir.attempt(number).mkdir(parents=True, exist_ok=True)
        write_json(run_dir.questions, {"rows": 5})
        data = Data(train=[], regenerate=Regenerate(rows_per_shard=2, **settings))
        return Shards(run_dir, number, Config(Run(dir=str(run_dir.root)), Target("target"), data), 5)

    return attempt


def answer(number: int, which: int = 0, **more: Any) -> Answer:
    row = {"id": number, "answer": which, "messages": [{"role": "assistant", "content": f"Grüße {number}"}]}
    line = b"" if "reason" in more else json.dumps(row, ensure_ascii=False).encode()
    return Answer(1, (number, which), line, **more)


def missing(shards: Shards) -> list[tuple[int, int]]:
    rows = [InputRow(number, "", b"") for number in range(1, 6)]
    return [prompt for prompt, _ in shards.missing(rows)]


def ids(folder: Path) -> list[int]:
    rows = [row for source in find_sources([str(folder)]) for _, row in source.rows()]
    return [json.loads(row)["id"] if isinstance(row, bytes) else row["id"] for row in rows]


def test_files_have_the_inputs_order_and_say_what_is_not_in_them(make: Make) -> None:
    shards = make()
    for number in (5, 3, 1, 2):
        shards.keep(answer(number, ways=("text",), tokens=7))
    shards.keep(answer(4, reason="too long", detail="in:4"))
    assert (shards.counts.done, shards.total) == (5, 5)
    shards.finish()
    assert ids(shards.folder) == [1, 2, 3, 5]
    record = json.loads((shards.folder.parent / "shards" / "00001.json").read_text())
    assert record == {
        "written": 1, "refused": {"too long": 1}, "ways": {"text": 1}, "tokens": 7,
        "without_answer": [{"row": 4, "reason": "too long", "detail": "in:4"}],
    }  # fmt: skip
    later = make(2)
    assert missing(later) == []
    assert later.counts == shards.counts


def test_an_attempt_that_died_at_any_byte_is_gone_on_with(make: Make, tmp_path: Path) -> None:
    shards = make()
    for number in (1, 3, 4, 5):
        shards.keep(answer(number))
    shards.finish()
    path = tmp_path / "run" / "shards" / "open" / "00000.1.jsonl"
    line = path.read_bytes()
    for cut in range(len(line)):
        path.write_bytes(line[:cut])
        assert missing(make()) == [(1, 0), (2, 0)]
    path.write_bytes(line)
    later = make(2)
    assert missing(later) == [(2, 0)]
    later.keep(answer(2))
    later.finish()
    assert ids(later.folder) == [1, 2, 3, 4, 5]
    assert finished(RunDir(tmp_path / "run"), later_config(tmp_path))


def later_config(tmp_path: Path) -> Config:
    return Config(Run(dir=""), Target(""), Data(train=[], regenerate=Regenerate(rows_per_shard=2)))


def test_a_shard_whose_record_is_missing_is_written_again(make: Make, tmp_path: Path) -> None:
    shards = make()
    shards.keep(answer(1))
    open_file = tmp_path / "run" / "shards" / "open" / "00000.1.jsonl"
    half = open_file.read_bytes()
    shards.keep(answer(2))
    shards.finish()
    (tmp_path / "run" / "shards" / "00000.json").unlink()
    open_file.write_bytes(half + half)
    later = make(2)
    assert missing(later)[0] == (2, 0)
    later.keep(answer(2))
    later.finish()
    assert ids(later.folder) == [1, 2]


def test_several_answers_of_a_prompt_stand_beside_each_other(make: Make) -> None:
    shards = make(answers=2, format="parquet")
    assert shards.total == 10
    assert missing(shards)[:3] == [(1, 0), (1, 1), (2, 0)]
    for number in range(5, 0, -1):
        for which in (1, 0):
            shards.keep(answer(number, which))
    shards.finish()
    assert ids(shards.folder) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_parquet_holds_what_data_reads(make: Make) -> None:
    calls = [{"type": "function", "function": {"name": "tide", "arguments": {"port": "Hull"}}}]
    rows = [
        {"id": 1, "messages": [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "High."}]},
        {
            "id": 2,
            "messages": [
                {"role": "user", "content": "Tide?"},
                {"role": "assistant", "content": "", "reasoning_content": "Look.", "tool_calls": calls},
            ],
            "tools": [{"type": "function", "function": {"name": "tide", "parameters": {"properties": {}}}}],
            "chat_template_kwargs": {"thinking": True},
        },
        {"id": 3, "messages": [{"role": "assistant", "content": "Ho", "token_ids": [3, 4]}], "mixed": 1},
        {"id": 4, "messages": [{"role": "assistant", "content": "Ho"}], "mixed": "one"},
    ]
    shards = make(format="parquet")
    for number, row in enumerate(rows, 1):
        shards.keep(Answer(1, (number, 0), json.dumps(row).encode()))
    shards.keep(answer(5, reason="too long"))
    shards.finish()
    read = [row for source in find_sources([str(shards.folder)]) for _, row in source.rows()]
    reader = RowReader(Data(train=[]))
    assert [reader.read(row) for row in read] == [reader.read(row) for row in rows]
    assert [row.get("mixed") for row in read] == [None, None, "1", '"one"']


def test_an_attempt_that_was_cut_off_writes_nothing_more(make: Make, tmp_path: Path) -> None:
    shards = make()
    make(2)
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        shards.keep(answer(1))

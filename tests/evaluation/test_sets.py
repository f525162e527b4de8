"""Benchmarks in the forms in which their authors publish them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from specbatch.errors import UserError
from specbatch.evaluation.sets import read_set

MT_BENCH = {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."], "reference": []}
GSM8K = {"question": "How many eggs?", "answer": "She has <<16-3=13>>13.\n#### 13"}
HUMANEVAL = {
    "task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": ""
}  # fmt: skip


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "question"), [(MT_BENCH, "Compose a post."), (GSM8K, "How many eggs?"), (HUMANEVAL, "def f():\n")]
)
def test_a_benchmark_is_told_by_its_columns(tmp_path: Path, row: dict[str, object], question: str):
    assert read_set("mine", write(tmp_path / "set.jsonl", row, "", row)) == [question, question]


def test_a_packed_file_is_read(tmp_path: Path):
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    assert read_set("humaneval", path) == ["def f():\n"]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "has no rows"),
        ([{"text": "a"}], "row 1 has the columns text, which match no known benchmark .*MT-Bench: question_id, turns"),
        (["[1]"], "row 1 is not a JSON object"),
        ([GSM8K, "{"], "row 2 is not JSON"),
        ([GSM8K, {"question": "?"}], "row 2 has no answer, which rows of GSM8K have"),
        ([GSM8K, "", GSM8K | {"question": None}], "row 3 has no question"),
        ([MT_BENCH, MT_BENCH | {"turns": []}], "row 2 has no question: its turns of MT-Bench is not text"),
        ([MT_BENCH, MT_BENCH | {"turns": 5}], "row 2 has no question"),
    ],
)
def test_what_is_wrong_is_told_by_file_and_row(tmp_path: Path, rows: list[object], told: str):
    path = write(tmp_path / "set.jsonl", *rows)
    with pytest.raises(UserError, match=f"evaluate.sets.mine: {re.escape(str(path))}: {told}"):
        read_set("mine", path)


def test_a_file_that_is_missing_or_no_text_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        read_set("mine", tmp_path / "absent")
    (tmp_path / "a.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="can't be read as lines of JSON"):
        read_set("mine", tmp_path / "a.gz")

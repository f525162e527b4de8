"""The first rows, tried before a job is queued."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.corpus import try_first_rows
from specbatch.corpus.first import FIRST_ROWS
from specbatch.errors import UserError
from tests.corpus.rows import Settings, lines
from tests.corpus.test_mask import talk

BAD = {"messages": [{"role": "user", "content": "Hi"}]}


def test_good_rows_say_nothing_and_leave_nothing(settings: Settings) -> None:
    config = settings({"a.jsonl": lines(*[talk("Hi", "Hello.")] * 3), "h.jsonl": lines(BAD)}, heldout=("h.jsonl",))
    assert try_first_rows(config).warnings == []
    assert config.data.cache_dir
    assert not Path(config.data.cache_dir).exists()


def test_rows_of_which_nothing_is_left_are_refused_though_there_are_more(settings: Settings) -> None:
    with pytest.raises(
        UserError, match=r"no sample out of 500 rows:\n  500 no assistant turn[^\n]*\nmost likely cause"
    ):
        try_first_rows(settings({"a.jsonl": lines(*[BAD] * FIRST_ROWS, talk("Hi", "Hello."))}))


def test_too_many_bad_rows_are_an_error_only_where_there_are_no_more(settings: Settings) -> None:
    mixed = [BAD, talk("Hi", "Hello.")]
    with pytest.raises(UserError, match="10 of 20 rows of the training data are unusable"):
        try_first_rows(settings({"a.jsonl": lines(*mixed * 10)}))
    (warning,) = try_first_rows(settings({"a.jsonl": lines(*mixed * FIRST_ROWS)})).warnings
    assert warning.startswith("of the first 500 rows, 250 of 500 rows of the training data are unusable (50.0 %)")

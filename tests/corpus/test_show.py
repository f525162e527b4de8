from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from specbatch.config import Config
from specbatch.corpus.show import marked, show
from tests.corpus.test_mask import talk
from tests.corpus.test_prepare import lines


def test_loss_tokens_stand_in_brackets_where_there_is_no_colour(
    settings: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    show(settings({"a.jsonl": lines(talk("Hi \U0001f600", "Hellö."), talk("Hi", "Bye."))}), samples=1)
    said = capsys.readouterr().out
    assert "<|im_start|>user\nHi \U0001f600<|im_end|>\n<|im_start|>assistant\n[[Hellö.<|im_end|>]]\n" in said
    assert said.startswith("sample 0, ")
    assert "sample 1" not in said
    assert "training data: 2 samples" in said
    assert "\x1b" not in said


def test_loss_tokens_are_coloured_in_a_terminal_and_data_cannot_write_to_it(tokenizer: Any) -> None:
    ids = np.array(tokenizer("a\x1b[2J\nb")["input_ids"])
    mask = np.zeros(ids.size, dtype=bool)
    mask[0] = True
    text = marked(tokenizer, ids, mask, color=True)
    assert text.startswith("\x1b[30;42ma\x1b[0m")
    assert "\x1b[2J" not in text
    assert "\\x1b" in text

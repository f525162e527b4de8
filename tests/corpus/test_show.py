from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specbatch.config import Config
from specbatch.corpus.report import template_report
from specbatch.corpus.show import marked, show
from tests.corpus import templates
from tests.corpus.rows import lines
from tests.corpus.templates import with_template
from tests.corpus.test_mask import talk


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


def test_the_report_tells_what_becomes_of_each_kind_of_conversation(
    settings: Callable[..., Config], target_copy: Path
) -> None:
    told = template_report(settings({}))
    assert "several turns: whole\n    loss: 12.<|im_end|>\n    loss: 15.<|im_end|>\n" in told
    assert "reasoning in thinking: in part\n    the chat template leaves out thinking, " in told
    assert "a tool call at the end: refused\n" in told
    told = template_report(settings({}, target=with_template(target_copy, templates.STRICT)))
    assert "system: refused\n    refused by the chat template: System role not supported\n" in told
    assert "begins with the assistant: in part\n    the chat template refuses conversations that begin with" in told
    told = template_report(settings({}, target=with_template(target_copy, templates.NO_END + "{{ strftime_now('') }}")))
    assert "one answer: in part\n    no end of turn to learn after 1 of the answers\n    loss: 12.\n" in told
    assert told.endswith("data.template_variables.date sets one")

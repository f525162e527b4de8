from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from specbatch.corpus.conversation import Conversation, read_row
from specbatch.corpus.prefixes import ends_of_messages
from specbatch.corpus.samples import Converter
from tests.corpus.test_mask import talk

Make = Callable[..., Converter]

LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
FORWARD = [
    LOOP,
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}" + LOOP.replace("messages", "rest"),
    "{% for t in tools or [] %}{{ t }}{% if loop.last %};{% endif %}{% endfor %}" + LOOP,
    "{% if tools %}" + LOOP + "{% else %}" + LOOP + "{% endif %}{% if add_generation_prompt %}>{% endif %}",
    LOOP.replace("{% endfor %}", "{% if loop.first %}.{% endif %}{% endfor %}"),
]
AHEAD = [
    LOOP.replace("{{ m.content }}", "{{ m.content }}{% if loop.last %}!{% endif %}"),
    LOOP.replace("{{ m.content }}", "{{ m.content }}{{ loop.length }}"),
    LOOP.replace("{{ m.content }}", "{% set l = loop %}{{ m.content }}{% if l.nextitem is defined %}+{% endif %}"),
    "{{ messages | length }}" + LOOP,
    "{{ messages[-1].content }}" + LOOP,
    "{% set ns = namespace(all=messages) %}{{ ns.all | length }}" + LOOP,
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}" + LOOP,
    "{% set ns = namespace(n=0) %}"
    + LOOP.replace("{{ m.role }}", "{{ m.role }}{% set ns.n = ns.n + 1 %}")
    + "{{ ns.n }}",
    "{% set text %}" + LOOP + "{% endset %}{{ text | length }}{{ text }}",
    "{% macro all(m) %}{{ m | length }}{% endmacro %}{{ all(messages) }}" + LOOP,
    LOOP.replace("in messages", "in messages if m.role != 'tool'"),
    LOOP.replace("in messages", "in messages[:-1]"),
    LOOP.replace("in messages", "in messages | reverse"),
    LOOP + "{% if not add_generation_prompt %}.{% endif %}",
    "{% for m in messages %}{% for n in messages %}.{% endfor %}{{ m.content }}{% endfor %}",
]


@pytest.fixture
def made(converter: Make) -> Make:
    def make(template: str, **data: Any) -> Converter:
        found = converter(split_turns=True, **data)
        found.template.tokenizer = copy.copy(found.template.tokenizer)
        found.template.tokenizer.chat_template = template
        return found

    return make


def conversation(turns: int) -> dict[str, Any]:
    said = [f"{word} {n}" for n in range(turns) for word in ("Which?", "This.")]
    row = talk(*said)
    return {"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]}


@pytest.mark.parametrize("template", FORWARD)
def test_a_template_that_goes_forward_once_is_rendered_as_often_for_many_turns_as_for_few(
    made: Make, template: str
) -> None:
    rendered: list[None] = []
    counts = []
    for turns in (4, 40):
        converter, row = made("{% if tick(None) %}{% endif %}" + template), conversation(turns)
        converter.template = converter.template.given({"tick": rendered.append})
        rendered.clear()
        converted = converter.convert("f:1", row)
        counts.append(len(rendered))
        assert len(converted.samples) == turns
        content = read_row(row, "auto")
        assert isinstance(content, Conversation)
        for turn, (ids, mask) in zip(content.assistant_turns, converted.samples, strict=True):
            alone = converter.turn(content, turn)
            assert np.array_equal(ids, alone[0])
            assert np.array_equal(mask, alone[1])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("template", AHEAD)
def test_a_template_that_may_look_ahead_is_rendered_for_each_turn(made: Make, template: str) -> None:
    converter = made(template)
    content = read_row(conversation(3), "auto")
    assert isinstance(content, Conversation)
    text = converter.template.render(content)
    assert ends_of_messages(template, content.messages, {"tools": None, "add_generation_prompt": False}, text) is None

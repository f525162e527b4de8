"""`data` reads what `regenerate` writes as the tokens of prompt and answer, for every chat template."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from specbatch.config import Data
from specbatch.corpus.conversation import Conversation, Rejected
from specbatch.corpus.samples import Converter
from specbatch.regenerate.fit import PARSED, TEXT, TOKENS, UNFINISHED, Fit
from specbatch.regenerate.parsers import Parsers
from tests.corpus import templates as t
from tests.tiny_target import tokenizer as tiny_tokenizer

Make = Callable[..., Fit]
QUESTION = {"role": "user", "content": "Where does the Rhine end?"}
ANSWER = "In the North Sea."
THOUGHT = "It is a river.</think>In the North Sea."
TOOL = {
    "type": "function",
    "function": {"name": "tide", "parameters": {"type": "object", "properties": {"port": {"type": "string"}}}},
}


@pytest.fixture
def fit() -> Make:
    """Makes a fit for a template."""
    known = tiny_tokenizer()
    known.add_tokens([AddedToken(text, special=True, normalized=False) for text in t.HEADERS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, eos_token="<|stop|>")

    def make(template: str, parsers: dict[str, str] | None = None, ends: Sequence[str] = (), **data: Any) -> Fit:
        own = copy.copy(tokenizer)
        own.chat_template = template
        ids = tuple(own.convert_tokens_to_ids(list(ends)))
        converter = Converter(own, ids, Data(train=[], **data), False, lambda mask: bool(mask.any()))
        return Fit(converter, Parsers(converter.template, parsers or {"reasoning_parser": "deepseek-r1"}))

    return make


def asked(fit: Fit, history: Conversation) -> np.ndarray:
    template = fit.converter.template
    return template.encode(template.render(history, prompt=True))[0]


def ids_of(fit: Fit, text: str) -> list[int]:
    return [int(token) for token in fit.converter.template.encode(text)[0]]


def say(fit: Fit, history: Conversation, text: str, finished: bool = True) -> tuple[dict[str, Any], str]:
    return fit.message(history, asked(fit, history), ids_of(fit, text), finished)


@pytest.mark.parametrize(
    ("template", "said", "way"),
    [
        (t.turns("<|say|>{{ m.content }}<|stop|>"), f"{ANSWER}<|stop|>", TEXT),
        (t.THOUGHT_CLOSED, f"{THOUGHT}<|stop|>", PARSED),
        (t.THOUGHT_IN_LAST, f"{THOUGHT}<|stop|>", PARSED),
        (t.THOUGHT_OPENED, f"{THOUGHT}<|stop|>", TOKENS),
        (t.THOUGHT_EMPTY, f"{THOUGHT}<|stop|>", TOKENS),
        (t.TWO_ENDS, f"{ANSWER}<|shut|>", TEXT),
        (t.CHANNELS, f"think<|part|>It is a river.<|shut|><|say|>speak<|part|>{ANSWER}<|stop|>", TOKENS),
        (t.PARTS, f"{ANSWER}<|stop|>", TEXT),
    ],
)
def test_an_answer_is_read_back_as_it_was_said(fit: Make, template: str, said: str, way: str) -> None:
    made, history = fit(template, ends=("<|shut|>",)), Conversation([QUESTION])
    message, how = say(made, history, said)
    assert how == way
    assert ("token_ids" in message) == (way == TOKENS)
    row = json.loads(json.dumps({"messages": [QUESTION, message]}))
    converted = made.converter.convert("row", row)
    ((ids, mask),) = converted.samples
    prompt, written = asked(made, history), ids_of(made, said)
    assert ids[: len(prompt) + len(written)].tolist() == [*prompt, *written]
    assert ids[mask].tolist() == written


def test_calls_come_back_as_calls(fit: Make) -> None:
    template = t.turns(
        "<|say|>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
        "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}<|stop|>"
    )
    made = fit(template, {"reasoning_parser": "qwen3", "tool_call_parser": "qwen25"})
    said = '<tool_call>\n{"name": "tide", "arguments": {"port": "Hull"}}\n</tool_call><|stop|>'
    message, how = say(made, Conversation([QUESTION], [TOOL]), said)
    assert how == TEXT  # where the text alone gives the same tokens, it is left as it was said
    refusing = "{% for m in messages if '<tool_call>' in m.content %}{{ raise_exception('no') }}{% endfor %}" + template
    made = fit(refusing, {"reasoning_parser": "qwen3", "tool_call_parser": "qwen25"})
    message, how = say(made, Conversation([QUESTION], [TOOL]), said)
    assert (how, message["tool_calls"][0]["function"]) == (PARSED, {"name": "tide", "arguments": {"port": "Hull"}})


def test_tokens_that_the_text_would_not_give_again_are_kept(fit: Make) -> None:
    made, history = fit(t.turns("<|say|>{{ m.content }}<|stop|>")), Conversation([QUESTION])
    written = [token for letter in ANSWER for token in ids_of(made, letter)] + ids_of(made, "<|stop|>")
    assert written != ids_of(made, f"{ANSWER}<|stop|>")
    message, how = made.message(history, asked(made, history), written, True)
    assert (how, message["token_ids"], message["content"]) == (TOKENS, written, ANSWER)
    ((ids, mask),) = made.converter.convert("row", {"messages": [QUESTION, message]}).samples
    assert ids[mask].tolist() == written


def test_an_answer_without_an_end_gets_none(fit: Make) -> None:
    made, history = fit(t.turns("<|say|>{{ m.content }}<|stop|>")), Conversation([QUESTION])
    message, how = say(made, history, "In the North", finished=False)
    assert (how, message) == (TEXT, {"role": "assistant", "content": "In the North", **UNFINISHED})
    with pytest.raises(Rejected, match="an empty answer"):
        say(made, history, " <|stop|>")


def test_answers_that_the_template_rewrites_later_are_learnt_as_they_were_said(fit: Make) -> None:
    made = fit(t.THOUGHT_IN_LAST)
    history, said = Conversation([QUESTION]), {}
    for turn in (1, 3):
        text = f"Thought {turn}.</think>Answer {turn}.<|stop|>"
        message, how = say(made, history, text)
        assert how == PARSED
        said[turn] = ids_of(made, text)
        history = Conversation([*history.messages, message, QUESTION])
    whole = made.kept(Conversation(history.messages[:-1]), said)
    assert [("token_ids" in message) for message in whole.messages] == [False, True, False, False]
    samples = made.converter.convert("row", {"messages": whole.messages}).samples
    assert [ids[mask].tolist() for ids, mask in samples] == [said[1], said[3]]
    split = fit(t.THOUGHT_IN_LAST, split_turns=True)
    assert split.kept(Conversation(history.messages[:-1]), said).messages == history.messages[:-1]


def test_a_conversation_says_itself_what_its_template_is_given(fit: Make) -> None:
    made = fit(t.turns("<|say|>{% if not think %}<think></think>{% endif %}{{ m.content }}<|stop|>"))
    row = {"messages": [QUESTION, {"role": "assistant", "content": ANSWER}]}
    texts = []
    for variables in ({}, {"think": True}, '{"think": true}'):
        converted = made.converter.convert("row", {**row, "chat_template_kwargs": variables})
        ((ids, _),) = converted.samples
        texts.append(made.converter.template.tokenizer.decode(ids))
    assert ["<think>" in text for text in texts] == [True, False, False]
    refused = made.converter.convert("row", {**row, "chat_template_kwargs": {"messages": []}}).rejected
    assert refused[0][0] == "a variable that the chat template cannot be given"


@pytest.mark.parametrize("ids", ["7", [], [1.5], [True]])
def test_tokens_beside_a_text_are_checked(fit: Make, ids: Any) -> None:
    made = fit(t.turns("<|say|>{{ m.content }}<|stop|>"))
    message = {"role": "assistant", "content": ANSWER, "token_ids": ids}
    assert made.converter.convert("row", {"messages": [QUESTION, message]}).rejected[0][0] == "malformed"
    message["token_ids"] = [10**6]
    rejected = made.converter.convert("row", {"messages": [QUESTION, message]}).rejected
    assert rejected[0][0] == "an id that the tokenizer does not have"

"""Text that a template has rendered before: its prompts are never learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from specbatch.corpus.samples import Converted, Converter
from tests.corpus import templates

Make = Callable[..., Converter]
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"


def converted(converter: Converter, text: str) -> tuple[Converted, list[str]]:
    """Return the result of a text, and the loss tokens of each of its samples."""
    found = converter.convert("a:1", {"text": text})
    tokenizer = converter.template.tokenizer
    return found, [tokenizer.decode(ids[mask]) for ids, mask in found.samples]


def test_answers_are_found_by_the_targets_own_headers(converter: Make) -> None:
    text = CHATML + CHATML.replace("Hello.", "Bye.")
    found, loss = converted(converter(prompts=True), text)
    assert loss == ["Hello.<|im_end|>Bye.<|im_end|>"]
    assert found.prompt is not None
    make = converter()
    assert make.template.tokenizer.decode(found.prompt).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    assert make.template.tokenizer.decode(found.samples[0][0]).endswith(text)
    assert converted(converter(loss_on="last"), text)[1] == ["Bye.<|im_end|>"]
    _, (whole,) = converted(converter(loss_on="all"), text)
    assert whole.endswith(text)


def test_an_answer_that_was_cut_off_has_no_end(converter: Make) -> None:
    assert converted(converter(), CHATML.removesuffix("<|im_end|>\n"))[1] == ["Hello."]


@pytest.mark.parametrize(
    "text",
    [
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.",
        "[INST] Hi [/INST] Hello.</s>",
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n",
        "<|user|>\nHi\n<|assistant|>\nHello.",
        "USER: Hi ASSISTANT: Hello.</s>",
        "\n\nHuman: Hi\n\nAssistant: Hello.",
        "### Instruction:\nHi\n\n### Response:\nHello.",
        "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>Hello.<|im_end|>",
        "<|user_start|>Hi<|user_end|><|assistant_start|>Hello.<|assistant_end|>",
        "<|USER_TOKEN|>Hi<|CHATBOT_TOKEN|>Hello.",
        "<｜hy_User｜>Hi<｜hy_Assistant｜>Hello.",
        "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>Hello.<|role_end|>",
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>Hello.",
        "<seed:bos>user\nHi<seed:eos><seed:bos>assistant\nHello.<seed:eos>",
        "]~b]user\nHi[e~[\n]~b]ai\nHello.[e~[",
        "<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello.",
        "<|prompt|>Hi</s><|answer|>Hello.</s>",
        "<human>: Hi\n<bot>: Hello.",
        "user: Hi\nassistant: Hello.",
        "Human: Hi\nAI: Hello.",
        "GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant: Hello.",
        "<|im_start|>user\nHi<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>model\nHello.<|im_end|>\n",
        CHATML.replace("Hello.<|im_end|>", "Hello.") + CHATML,
    ],
)
def test_text_that_cannot_be_taken_apart_is_refused(converter: Make, text: str) -> None:
    found, loss = converted(converter(), text)
    assert loss == []
    assert [reason for reason, _ in found.rejected] == ["preformatted text"]


@pytest.mark.parametrize(
    "text",
    [
        "Plain text of nobody.",
        "An assistant: somebody who helps.",
        "The user: a human. No answer here.",
        "Vec<User> and <system>, <role>Baker</role>, List<Human> [user] <s>ystem",
        "Q: Who?\nA: Ann.",
    ],
)
def test_plain_text_is_loss_from_end_to_end(converter: Make, text: str) -> None:
    _, (loss,) = converted(converter(), text)
    assert loss.endswith(text)


def test_a_template_whose_thought_is_open_takes_it_as_part_of_the_prompt(converter: Make) -> None:
    thinking = templates.CHATML_TOOLS.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
    _, loss = converted(converter(thinking), CHATML.replace("Hello.", "<think>\nWell.</think>Hello."))
    assert loss == ["Well.</think>Hello.<|im_end|>"]
    assert converted(converter(thinking), CHATML)[1] == ["Hello.<|im_end|>"]


def test_rows_that_were_tokenised_before_are_checked_and_kept(converter: Make) -> None:
    def kept(row: dict[str, Any], **data: Any) -> Converted:
        return converter(prompts=True, **data).convert("a:1", row)

    row = {"input_ids": [5, 6, 7, 8, 9, 10, 11], "loss_mask": [0, 0, 1, 1, 0, 1, 1]}
    ((ids, mask),) = kept(row).samples
    assert (ids.tolist(), mask.tolist()) == (row["input_ids"], [bool(loss) for loss in row["loss_mask"]])
    assert kept(row).prompt.tolist() == [5, 6]  # type: ignore[union-attr]
    assert kept(row, loss_on="last").samples[0][1].tolist() == [False] * 5 + [True] * 2
    assert (
        kept({**row, "input_ids": [5, 6, 7, 8, 9, 10, 600]}).rejected[0][0] == "an id that the tokenizer does not have"
    )
    assert kept({"input_ids": [5, 6, 7]}).rejected[0][0] == "tokenised without a loss mask"
    assert kept({"input_ids": [5, 6, 7]}, loss_on="all").samples[0][1].all()

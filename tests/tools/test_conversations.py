"""The quickstart's conversations: fit to be shipped, and held-out ones unlike those that are trained on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tools.conversations.__main__ import goes_in_circles
from tools.conversations.prompts import SIMILAR, UNWANTED, clean, stands_alone, unlike, words

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "quickstart"


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress((SHIPPED / name).read_bytes()).splitlines()]


def prompt_of(row: dict[str, Any]) -> str:
    return next(message["content"] for message in row["messages"] if message["role"] == "user")


@pytest.mark.parametrize(
    "text",
    [
        "Too short",
        "Write to me at somebody@example.org, will you?",
        "Have you seen www.example.org already?",
        "My number is 555 12345, call me",
        "WHY ARE YOU SHOUTING AT ME?",
        "Do you hate your job?",
        "¿Cómo estás, mi amigo?",
        "word " * 60,
    ],
)
def test_what_is_no_fit_prompt_is_left_out(text: str):
    assert clean(text) is None


def test_a_prompt_is_tidied():
    assert clean("  what’s   your favourite\nanimal? ") == "What's your favourite animal?"


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("What is your favorite kind of music?", True),
        ("Do you think that I'm a robot or so?", False),
        ("Have you seen Peter in the park?", False),
        ("What about it, do you like it?", False),
        ("I like cats more than dogs.", False),
        ("If I could fly, where would I go?", True),
    ],
)
def test_only_questions_that_need_no_talk_before_them_are_taken_from_talks(text: str, alone: bool):
    assert stands_alone(text) is alone


def test_of_prompts_alike_the_first_is_kept():
    prompts = ["What is the largest ocean?", "what is the largest ocean", "Who wrote Hamlet?", "What is the ocean?"]
    assert unlike(prompts) == ["What is the largest ocean?", "Who wrote Hamlet?"]


def test_an_answer_that_goes_in_circles_is_noticed():
    assert goes_in_circles("I like to go to the sea. " * 3)
    assert not goes_in_circles("I like to go to the sea. I like to go to the sea. And that is all.")


@pytest.mark.light
def test_the_shipped_conversations_are_whole_unlike_and_inoffensive():
    train, heldout = read("train.jsonl.gz"), read("heldout.jsonl.gz")
    prompts = [prompt_of(row) for row in [*heldout, *train]]
    assert len(heldout) == 100
    assert unlike(prompts) == prompts
    texts = [message["content"] for row in [*heldout, *train] for message in row["messages"]]
    assert not [text for text in texts if UNWANTED.search(text.lower())]
    for row in [*heldout, *train]:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["messages"][-1]["content"].strip()
    assert len({row["id"] for row in [*heldout, *train]}) == len(prompts)


@pytest.mark.light
def test_no_held_out_prompt_is_like_one_that_is_trained_on():
    train = [words(prompt_of(row)) for row in read("train.jsonl.gz")]
    for row in read("heldout.jsonl.gz"):
        own = words(prompt_of(row))
        assert max(len(own & other) / len(own | other) for other in train) <= SIMILAR

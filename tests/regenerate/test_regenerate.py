"""The target's own answers, by the real engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specbatch.corpus.conversation import Conversation
from specbatch.errors import UserError
from specbatch.regenerate import Regenerate, regenerate
from specbatch.regenerate.speaker import Speaker, answer_seed


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_each_answer_has_a_seed_of_its_own():
    seeds = {answer_seed(seed, row, message) for seed in range(4) for row in range(50) for message in range(4)}
    assert len(seeds) == 4 * 50 * 4
    assert all(0 <= seed < 1 << 31 for seed in seeds)


def test_all_tokens_that_end_an_answer_are_known(tiny_target: Path, tmp_path: Path):
    for file in tiny_target.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert Speaker(Regenerate(str(tmp_path), [], "out")).stop_ids == [0, 2]


def test_an_empty_input_is_the_users_to_mend(tiny_target: Path, tmp_path: Path):
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="no rows"):
        regenerate(Regenerate(str(tiny_target), [empty], str(tmp_path / "out.jsonl")))


@pytest.mark.slow
def test_broken_off_and_called_again_it_gives_the_same_answers_in_the_same_order(tiny_target: Path, tmp_path: Path):
    talk = [{"role": role, "content": f"{role} {turn}"} for turn in range(2) for role in ("user", "assistant")]
    rows = [{"id": 0, "prompt": "First?"}, {"id": 1, "messages": talk}, "broken"]
    rows += [{"id": number, "prompt": f"Question {number}?"} for number in range(3, 12)]
    options = Regenerate(
        target=str(tiny_target),
        input=[write(tmp_path / "in.jsonl", *rows)],
        output=str(tmp_path / "out.jsonl"),
        dtype="float32",
        max_new_tokens=6,
        unfinished="keep",
        threads=1,
        batch_size=4,
    )
    calls: list[tuple[int, int, float]] = []
    summary = regenerate(options, lambda *told: calls.append(told))
    answers = read(options.output)
    assert (summary.rows, summary.written, summary.skipped) == (12, 11, {"not JSON": 1})
    assert [row["id"] for row in answers] == [0, 1, *range(3, 12)]
    assert [done for done, _, _ in calls] == list(range(1, 13))
    for row in answers:
        last = row["messages"][-1]
        assert last["role"] == "assistant"
        assert last.get("finish_reason", "length") == "length"
    whole = Path(options.output).read_bytes()
    assert regenerate(options).generated_tokens == 0

    Path(options.output).write_bytes(whole[: len(whole) // 2])
    options.engines = 2
    regenerate(options)
    assert Path(options.output).read_bytes() == whole


@pytest.mark.slow
def test_the_target_says_what_it_would_say_and_whole_answers_only(smollm: Path, tmp_path: Path):
    question = "What is the capital of France?"
    talk = [("user", question), ("assistant", "London.")]
    options = Regenerate(
        target=str(smollm),
        input=[
            write(
                tmp_path / "in.jsonl",
                {"messages": [{"role": role, "content": text} for role, text in talk], "source": "mine"},
                {"messages": [{"role": "user", "content": "Write a very long story about a dragon."}]},
            )
        ],
        output=str(tmp_path / "out.jsonl"),
        max_new_tokens=16,
        threads=1,
    )
    summary = regenerate(options)
    assert summary.skipped == {"an answer without an end": 1}
    (row,) = read(options.output)
    assert row == {
        "source": "mine",
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "The capital of France is Paris."},
        ],
    }
    speaker = Speaker(options)
    text = speaker.template.render(Conversation(row["messages"]))
    assert text.endswith("The capital of France is Paris.<|im_end|>\n")

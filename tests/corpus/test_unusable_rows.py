"""Rows that give no sample, or not all of it, are counted by reason, with the first place of each."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from specbatch.corpus import corpus_of, prepare
from specbatch.corpus.tokenizer import load_tokenizer
from specbatch.errors import UserError
from tests.corpus import templates
from tests.corpus.rows import A1, Settings, lines
from tests.corpus.templates import with_template
from tests.corpus.test_mask import talk


def test_a_row_that_the_template_refuses_is_named_with_the_templates_words(
    settings: Settings, target_copy: Path
) -> None:
    target = with_template(target_copy, templates.STRICT)
    system = {"messages": [{"role": "system", "content": "x"}, *talk("Hi", "Hello.")["messages"]]}
    files = {"a.jsonl": lines(talk("Hi", "Hello."), system, talk("Bye", "Bye."))}
    summary = prepare(settings(files, target=target, max_bad_fraction=0.4))
    assert summary.train.samples == 2
    assert "1 refused by the chat template: System role not supported" in summary.text()
    assert "a.jsonl:2" in summary.text()
    with pytest.raises(UserError, match=r"1 of 3 rows of the training data are unusable \(33.3 %\)(.|\n)*a.jsonl:2"):
        prepare(settings(files, target=target))


def test_a_first_turn_of_the_assistant_is_left_out_where_the_template_refuses_it_and_counted(
    settings: Settings, target_copy: Path
) -> None:
    config = settings({"a.jsonl": lines(A1)}, target=with_template(target_copy, templates.STRICT))
    summary = prepare(config)
    sample = corpus_of(summary).sample(0)
    assert load_tokenizer(config).decode(sample.input_ids[sample.loss_mask]) == "Done.<|im_end|>"
    assert "that turn is dropped: Conversation roles must alternate" in summary.text()


def test_a_share_of_refused_rows_ends_the_preparation(settings: Settings, target_copy: Path) -> None:
    rows = [talk("Hi", "Hello."), {"messages": [{"role": "system", "content": "x"}, *talk("Hi", "Hello.")["messages"]]}]
    rows.append({"messages": [{"role": "user", "content": "a"}, *talk("Hi", "Hello.")["messages"]]})
    config = settings(
        {"a.jsonl": lines(*rows)}, target=with_template(target_copy, templates.STRICT), max_bad_fraction=0.2
    )
    with pytest.raises(UserError, match="2 of 3 rows") as caught:
        prepare(config)
    assert "System role not supported" in str(caught.value)


@pytest.mark.parametrize("content", [json.dumps(talk("Hi", "Hello."), indent=1), json.dumps([talk("Hi", "Hello.")])])
def test_a_file_whose_lines_are_no_objects_is_told_what_they_have_to_be(settings: Settings, content: str) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1(.|\n)*one JSON object in each line, or, as \.json, be one array"):
        prepare(settings({"a.jsonl": content.encode()}))


def test_data_that_give_no_sample_end_with_counts_first_lines_and_the_likeliest_cause(settings: Settings) -> None:
    bad = [
        {"messages": [{"role": "system", "content": "Be brief."}]},
        {"messages": []},
        {"messages": [{"role": "user", "content": "Hi"}]},
    ]
    content = lines(*bad) + b"\n" + lines({"conversation": [{"role": "user", "content": "Hi"}]})
    with pytest.raises(UserError) as caught:
        prepare(settings({"a.jsonl": content}, max_bad_fraction=1.0))
    said = str(caught.value)
    assert "no sample out of 5 rows" in said
    for expected in (
        "2 no assistant turn (first: ",
        "1 empty conversation",
        "1 blank line",
        "1 without the key messages",
    ):
        assert expected in said
    for number in (1, 2, 4, 5):
        assert f"a.jsonl:{number}" in said
    assert "most likely cause: these are prompts without answers" in said
    with pytest.raises(UserError, match="the files are empty"):
        prepare(settings({"empty.jsonl": b""}))


def test_answers_that_no_template_shows_end_the_preparation(settings: Settings, target_copy: Path) -> None:
    target = with_template(target_copy, templates.NO_END.replace("+ message.content", ""))
    with pytest.raises(UserError, match="most likely cause: the target's chat template hides"):
        prepare(settings({"a.jsonl": lines(A1)}, target=target, max_bad_fraction=1.0))


def test_conversations_need_a_chat_template_and_text_does_not(settings: Settings, target_copy: Path) -> None:
    path = target_copy / "tokenizer_config.json"
    kept = json.loads(path.read_text())
    del kept["chat_template"]
    path.write_text(json.dumps(kept))
    with pytest.raises(UserError, match="has no chat template"):
        prepare(settings({"a.jsonl": lines(A1)}, target=target_copy))
    corpus = corpus_of(prepare(settings({"t.jsonl": lines({"text": "Some plain text."})}, target=target_copy)))
    assert corpus.sample(0).loss_mask.all()
    with_template(target_copy, "{% for")
    with pytest.raises(UserError, match="chat template is wrong in line 1"):
        prepare(settings({"a.jsonl": lines(A1)}, target=target_copy))


LONG = " ".join(["word"] * 600)


def test_long_samples_are_truncated_or_skipped_as_configured(settings: Settings) -> None:
    files = {"a.jsonl": lines(talk("Hi", LONG), talk(LONG, "Hello."), talk("Hi", "Hello."))}
    summary = prepare(settings(files, max_tokens=200))
    corpus = corpus_of(summary)
    assert (summary.train.samples, summary.train.truncated, summary.train.length_max) == (2, 1, 200)
    assert [len(corpus.sample(0).input_ids), len(corpus.sample(0).loss_mask)] == [200, 200]
    assert "1 no loss token within max_tokens" in summary.text()
    assert "a.jsonl:2" in summary.text()
    summary = prepare(settings(files, max_tokens=200, overlong="skip"))
    assert (summary.train.samples, summary.train.truncated) == (1, 0)
    assert "2 longer than max_tokens" in summary.text()
    with pytest.raises(UserError, match=r"most likely cause: raise data\.max_tokens"):
        prepare(settings({"b.jsonl": lines(talk(LONG, "Hello."))}, max_tokens=200))


def test_what_templates_drop_is_counted_with_the_first_line(settings: Settings, target_copy: Path) -> None:
    thoughts = talk("2+2?", "4", "3+3?", "6", reasoning_content="add")
    thoughts["messages"][1]["reasoning_content"] = "add"
    files = {"a.jsonl": lines(talk("Hi", "Hello."), thoughts, A1)}
    summary = prepare(settings(files, target=with_template(target_copy, templates.STRICT)))
    assert summary.train.samples == 3
    assert (
        "the chat template leaves out reasoning_content, which the conversation has (2 times, first: " in summary.text()
    )
    assert "that turn is dropped: Conversation roles must alternate user/assistant/user/assistant/... (1 times, " in (
        summary.text()
    )
    assert "a.jsonl:2)" in summary.text()


def test_a_row_of_which_nothing_is_to_be_learnt_is_no_fault(settings: Settings) -> None:
    summary = prepare(settings({"a.jsonl": lines(talk("Hi", "Hello."), talk("Hi", "Hello?", weight=0))}))
    assert (summary.train.samples, summary.train.bad_rows) == (1, 0)
    assert "1 no answer that is to be learnt (first: " in summary.text()


def test_a_sample_that_teaches_nothing_is_dropped_and_counted(settings: Settings) -> None:
    summary = prepare(settings({"a.jsonl": lines({"text": "a"}, {"text": "Some more."})}, max_bad_fraction=0.5))
    assert summary.train.samples == 1
    assert "1 no loss token (first: " in summary.text()


def test_every_kind_of_bad_line_is_named_and_skipped(settings: Settings) -> None:
    good = json.dumps(talk("Hi", "Hello.")).encode()
    surrogate = rb'{"messages": [{"role": "user", "content": "x \ud83d"}, {"role": "assistant", "content": "y"}]}'
    content = b"\r\n".join(
        [
            b"\xef\xbb\xbf" + good,
            good,
            good[:-1] + b",}",
            b'{"weight": NaM, ' + good[1:],
            surrogate,
            surrogate.replace(rb"\ud83d", rb"\ud83d\ude00"),
            json.dumps(talk("Hi", "long " * 20_000)).encode(),
            b"\xff\xfe",
            b"",
        ]
    )
    summary = prepare(settings({"a.jsonl.gz": gzip.compress(content)}, max_bad_fraction=0.6))
    said = summary.text()
    assert summary.train.samples == 4
    for reason, line in (("2 not JSON", 3), ("1 lone surrogate", 5), ("1 not UTF-8", 8)):
        assert f"{reason} (first: " in said
        assert f"a.jsonl.gz:{line}" in said
    assert "U+D83D is half a character" in said
    assert "1 samples repeat an earlier one (first: " in said
    assert summary.train.truncated == 1


def test_roles_of_ones_own_are_listed_by_name(settings: Settings) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": name, "value": "b"}]}
        for name in ("GPT", "my_model_v2")
    ]
    summary = prepare(settings({"a.jsonl": lines(*rows)}, max_bad_fraction=0.5))
    assert summary.train.samples == 1
    assert "1 unknown role 'my_model_v2' (first: " in summary.text()

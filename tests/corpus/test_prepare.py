"""Preparation from files to what a run reads: nothing is lost without a reason, nothing is done twice."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from specbatch.config import Config
from specbatch.corpus import Corpus, attach, corpus_of, make_plan, open_corpus, planned_steps, prepare, prompts
from specbatch.corpus.convert import convert_rows
from specbatch.corpus.samples import Converted
from specbatch.corpus.tokenizer import load_tokenizer
from specbatch.errors import RunError, UserError
from specbatch.rundir import RunDir
from tests.corpus import templates
from tests.corpus.test_mask import talk

Settings = Callable[..., Config]


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def with_template(target: Path, template: str) -> Path:
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return target


A1 = {
    "conversations": [
        {"from": "gpt", "value": "Sure."},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "Done."},
    ]
}


def test_what_is_prepared_is_what_every_process_of_the_run_opens(settings: Settings, tmp_path: Path) -> None:
    config = settings(
        {"a.jsonl": lines(talk("Hi", "Hello."), A1), "h.jsonl": lines(talk("Why?", "So."))}, heldout=("h.jsonl",)
    )
    told: list[tuple[str, int, int]] = []
    summary = prepare(config, lambda *progress: told.append(progress))
    attach(RunDir(tmp_path / "run"), summary)
    corpus = open_corpus(RunDir(tmp_path / "run"))
    assert len(corpus) == 2
    assert told[-1] == ("preparing held-out data", 1, 1)
    samples = [corpus.sample(i) for i in range(2)]
    assert [s.input_ids.dtype for s in samples] == [np.int32, np.int32]
    assert [s.loss_mask.dtype for s in samples] == [bool, bool]
    assert [len(s.input_ids) for s in samples] == corpus.lengths.tolist()
    assert corpus.lengths.dtype == corpus.loss_token_counts.dtype == np.int64
    expected = np.bincount(np.concatenate([s.input_ids[s.loss_mask] for s in samples]), minlength=512)
    assert corpus.loss_token_counts.tolist() == expected.tolist()
    assert corpus.tokenizer_size == 512
    tokenizer = load_tokenizer(config)
    assert tokenizer.decode(samples[0].input_ids[samples[0].loss_mask]) == "Hello.<|im_end|>"
    assert corpus.place(1).endswith("a.jsonl:2")
    assert corpus.heldout is not None
    (prompt,) = prompts(config, corpus.heldout)
    assert tokenizer.decode(prompt).endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert corpus.sample(2).input_ids.tolist() == corpus.heldout.sample(0).input_ids.tolist()
    for i in (-1, 3):
        with pytest.raises(IndexError):
            corpus.sample(i)
    plan = make_plan(config, corpus)
    assert plan.steps == planned_steps(config, plan) == 1
    config.training.epochs, config.training.max_steps = 40, 2
    config.training.tokens_per_pack = int(corpus.lengths.max())
    assert planned_steps(config, make_plan(config, corpus)) == 2


def test_a_run_whose_prepared_data_are_gone_says_so(settings: Settings, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(RunError, match="never prepared"):
        open_corpus(run)
    summary = prepare(settings({"a.jsonl": lines(A1)}))
    attach(run, summary)
    (Path(summary.train.path) / "part.json").unlink()
    with pytest.raises(RunError, match="no longer there"):
        open_corpus(run)


def test_data_are_prepared_once_until_anything_changes_that_the_result_depends_on(
    settings: Settings, target_copy: Path, tmp_path: Path
) -> None:
    config = settings({"a.jsonl": lines(talk("Hi", "Hello."), A1)}, target=target_copy)
    first = prepare(config)
    assert not first.cached
    config.data.workers, config.data.max_bad_fraction = 3, 0.5
    again = prepare(config)
    assert again.cached
    assert again.train == first.train
    assert "prepared before" in again.text()
    seen = {first.train.path}

    def prepared_anew() -> bool:
        path = prepare(config).train.path
        known = path in seen
        seen.add(path)
        return not known

    config.data.max_tokens = 100
    assert prepared_anew()
    config.data.loss_on = "last"
    assert prepared_anew()
    with_template(target_copy, templates.MARKED)
    assert prepared_anew()
    tokenizer = json.loads((target_copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = True
    (target_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert prepared_anew()
    (tmp_path / "a.jsonl").write_bytes(lines(talk("Hi", "Hellö.")))
    assert prepared_anew()
    assert not prepared_anew()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_row_that_the_template_refuses_is_named_with_the_templates_words(
    settings: Settings, target_copy: Path
) -> None:
    target = with_template(target_copy, templates.STRICT)
    files = {"a.jsonl": lines(talk("Hi", "Hello."), A1, talk("Bye", "Bye."))}
    summary = prepare(settings(files, target=target, max_bad_fraction=0.4))
    assert summary.train.samples == 2
    assert "1 refused by the chat template: Conversation roles must alternate" in summary.text()
    assert "a.jsonl:2" in summary.text()
    with pytest.raises(UserError, match=r"1 of 3 rows of the training data are unusable \(33.3 %\)(.|\n)*a.jsonl:2"):
        prepare(settings(files, target=target))


def test_a_share_of_refused_rows_ends_the_preparation(settings: Settings, target_copy: Path) -> None:
    rows = [talk("Hi", "Hello."), {"messages": [{"role": "system", "content": "x"}, *talk("Hi", "Hello.")["messages"]]}]
    rows.append({"messages": [{"role": "user", "content": "a"}, *talk("Hi", "Hello.")["messages"]]})
    config = settings(
        {"a.jsonl": lines(*rows)}, target=with_template(target_copy, templates.STRICT), max_bad_fraction=0.2
    )
    with pytest.raises(UserError, match="2 of 3 rows") as caught:
        prepare(config)
    assert "System role not supported" in str(caught.value)


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
    assert "likeliest cause: these are prompts without answers" in said
    with pytest.raises(UserError, match="the files are empty"):
        prepare(settings({"empty.jsonl": b""}))


def test_answers_that_no_template_shows_end_the_preparation(settings: Settings, target_copy: Path) -> None:
    target = with_template(target_copy, templates.NO_END.replace("+ message.content", ""))
    with pytest.raises(UserError, match="likeliest cause: the target's chat template hides"):
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
    with pytest.raises(UserError, match=r"likeliest cause: raise data\.max_tokens"):
        prepare(settings({"b.jsonl": lines(talk(LONG, "Hello."))}, max_tokens=200))


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
            b'{"weight": NaN, ' + good[1:],
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


def test_held_out_data_may_be_prompts_without_answers(settings: Settings) -> None:
    files = {
        "a.jsonl": lines(A1),
        "h.jsonl": lines({"messages": [{"role": "user", "content": "Why?"}]}, {"text": "x y z"}, A1),
    }
    config = settings(files, heldout=("h.jsonl",))
    heldout = corpus_of(prepare(config)).heldout
    assert heldout is not None
    assert len(heldout) == 2
    assert len(prompts(config, heldout)) == 1
    config.evaluate.prompts = 0
    assert prompts(config, heldout) == []


def test_a_summary_says_what_came_of_the_data(settings: Settings) -> None:
    text = prepare(settings({"a.jsonl": lines(A1, talk("Hi", "Hello."))})).text()
    assert text.startswith("training data: 2 samples of 2 rows, ")
    assert "median" in text
    assert "prepared in " in text


def _same(a: list[Converted], b: list[Converted]) -> None:
    assert [row.place for row in a] == [row.place for row in b]
    assert [row.rejected for row in a] == [row.rejected for row in b]
    flat = [[array.tobytes() for row in rows for sample in row.samples for array in sample] for rows in (a, b)]
    assert flat[0] == flat[1]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_samples_in_the_same_order(settings: Settings) -> None:
    config = settings({})
    rows = [(f"f:{i}", lines(talk("Hi", f"Answer {i}.")) if i % 7 else b"bad") for i in range(400)]
    tokenizer = load_tokenizer(config)

    def converted(workers: int) -> list[Converted]:
        batches = convert_rows(config, tokenizer, iter(rows), len(rows), prompts=False, workers=workers)
        return [row for batch in batches for row in batch]

    _same(converted(1), converted(4))


@pytest.mark.slow
def test_a_killed_process_of_the_preparation_ends_it_with_an_error(settings: Settings) -> None:
    config = settings({})
    rows = ((f"f:{i}", lines(talk("Hi", f"Answer {i}."))) for i in range(100_000))
    others = set(psutil.Process().children(recursive=True))
    batches = convert_rows(config, load_tokenizer(config), rows, 100_000, prompts=False, workers=2)
    next(batches)
    started = set(psutil.Process().children(recursive=True)) - others
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):  # one of the test before, that just ends
            if child.ppid() != os.getpid() and child.status() != psutil.STATUS_ZOMBIE:
                child.kill()
                break
    with pytest.raises(RunError, match=r"was killed.*data\.workers"):
        list(batches)


@pytest.mark.slow
def test_the_quickstarts_target_gives_every_answer_and_its_end(smollm: Path, settings: Settings) -> None:
    config = settings({"a.jsonl": lines(talk("Who are you?", "I am SmolLM.", "Sure?", "Yes."))}, target=smollm)
    corpus: Corpus = corpus_of(prepare(config))
    tokenizer, sample = load_tokenizer(config), corpus.sample(0)
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "I am SmolLM.<|im_end|>Yes.<|im_end|>"
    assert tokenizer.decode(sample.input_ids).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert corpus.tokenizer_size == 49152

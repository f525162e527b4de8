"""Preparation from files to what a run reads: nothing is lost without a reason, nothing is done twice."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from specbatch.config import Config
from specbatch.corpus import Corpus, attach, corpus_of, make_plan, open_corpus, planned_steps, prepare
from specbatch.corpus.convert import Conversion
from specbatch.corpus.samples import Converted
from specbatch.corpus.tokenizer import load_tokenizer, tokenizer_size
from specbatch.errors import RunError, UserError
from specbatch.plan import HELD_OUT
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
    (prompt,) = corpus.heldout.prompts()
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
    with pytest.raises(RunError, match="no longer exist"):
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
    config.data.template_variables = {"enable_thinking": False}
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


def test_held_out_data_may_be_prompts_without_answers(settings: Settings) -> None:
    files = {
        "a.jsonl": lines(A1),
        "h.jsonl": lines({"messages": [{"role": "user", "content": "Why?"}]}, {"text": "x y z"}, A1),
    }
    config = settings(files, heldout=("h.jsonl",))
    heldout = corpus_of(prepare(config)).heldout
    assert heldout is not None
    assert len(heldout) == 2
    assert len(heldout.prompts()) == 1


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


@pytest.mark.light
def test_any_number_of_processes_gives_the_same_samples_in_the_same_order(settings: Settings) -> None:
    config = settings({})
    rows = [(f"f:{i}", lines(talk("Hi", f"Answer {i}.")) if i % 7 else b"bad") for i in range(400)]

    def converted(workers: int) -> list[Converted]:
        with Conversion(config, len(rows), prompts=False, workers=workers) as conversion:
            assert conversion.tokenizer_size == tokenizer_size(load_tokenizer(config))
            return [row for batch in conversion.batches(iter(rows)) for row in batch]

    _same(converted(1), converted(4))


@pytest.mark.light
def test_a_killed_process_of_the_preparation_ends_it_with_an_error(settings: Settings, target_copy: Path) -> None:
    config = settings({}, target=target_copy)
    rows = ((f"f:{i}", lines(talk("Hi", f"Answer {i}."))) for i in range(100_000))
    others = set(multiprocessing.active_children())
    with Conversion(config, 100_000, prompts=False, workers=2) as conversion:
        batches = conversion.batches(rows)
        next(batches)
        (set(multiprocessing.active_children()) - others).pop().kill()
        with pytest.raises(RunError, match=r"was killed.*data\.workers"):
            list(batches)
    for path in target_copy.glob("tokenizer*"):
        path.unlink()
    with (
        Conversion(config, 100_000, prompts=False, workers=2) as conversion,
        pytest.raises(UserError, match=r"target\.path: the tokenizer in "),
    ):
        list(conversion.batches(rows))


@pytest.mark.light
def test_the_quickstarts_target_gives_every_answer_and_its_end(smollm: Path, settings: Settings) -> None:
    config = settings({"a.jsonl": lines(talk("Who are you?", "I am SmolLM.", "Sure?", "Yes."))}, target=smollm)
    corpus: Corpus = corpus_of(prepare(config))
    tokenizer, sample = load_tokenizer(config), corpus.sample(0)
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "I am SmolLM.<|im_end|>Yes.<|im_end|>"
    assert tokenizer.decode(sample.input_ids).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert corpus.tokenizer_size == 49152


def test_samples_that_repeat_are_counted_and_left_out_if_asked(settings: Settings) -> None:
    one, two = talk("Hi", "Hello."), talk("Why?", "So.")
    files = {"a.jsonl": lines(one, two, one), "b.jsonl": lines(two, talk("And?", "Or."))}
    kept = prepare(settings(files))
    assert kept.train.samples == 5
    assert "2 samples repeat an earlier one (first: " in kept.text()
    assert "a.jsonl:3); kept" in kept.text()
    dropped = prepare(settings(files, duplicates="drop"))
    corpus, every = corpus_of(dropped), corpus_of(kept)
    assert "2 samples repeat an earlier one" in dropped.text()
    assert [corpus.place(i).rpartition("/")[2] for i in range(3)] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:2"]
    assert [len(corpus.sample(i).input_ids) for i in range(3)] == corpus.lengths.tolist()
    assert dropped.train.tokens == corpus.lengths.sum()
    assert corpus.entry_sizes == [2, 1]
    assert every.entry_sizes == [3, 2]
    masks = [corpus.sample(i).loss_mask for i in range(3)]
    assert dropped.train.loss_tokens == sum(int(mask.sum()) for mask in masks) == corpus.loss_token_counts.sum()
    assert corpus.fingerprint != every.fingerprint
    only = int(
        np.setdiff1d(corpus.sample(2).input_ids, np.concatenate([corpus.sample(i).input_ids for i in (0, 1)]))[0]
    )
    assert (corpus.first_with(only), every.first_with(only), every.first_with(-1)) == (2, 4, None)


def test_masks_of_held_out_samples_stand_behind_the_others_where_asked_for(settings: Settings) -> None:
    config = settings(
        {"a.jsonl": lines(talk("Hi", "Hello.")), "h.jsonl": lines(talk("No", "Oh."))}, heldout=("h.jsonl",)
    )
    corpus = corpus_of(prepare(config))
    assert len(list(corpus.masks())) == 1
    own, heldout = corpus.masks(heldout=True)
    assert own.sample(0) == (0, 0)
    assert heldout.sample(0) == (HELD_OUT, 1)
    assert heldout.mask_N.tolist() == corpus.sample(1).loss_mask.tolist()


def test_held_out_samples_that_are_trained_on_are_counted_by_content(settings: Settings) -> None:
    one, two = talk("Hi", "Hello."), talk("Why?", "So.")
    files = {"a.jsonl": lines(one, talk("And?", "Or.")), "h.jsonl": lines(two, {**one, "id": 7}, one)}
    summary = prepare(settings(files, heldout=("h.jsonl",)))
    assert (summary.shared, summary.first_shared.rpartition("/")[2]) == (2, "h.jsonl:2")
    assert "warning: 2 of 3 held-out samples equal a training sample" in summary.text()


def test_a_changed_file_costs_that_file_and_what_was_broken_off_is_gone_on_with(
    settings: Settings, tmp_path: Path
) -> None:
    files = {"a.jsonl": lines(talk("Hi", "Hello.")), "b.jsonl": lines(talk("Why?", "So."))}
    config = settings(files)
    first = prepare(config).train
    (tmp_path / "b.jsonl").write_bytes(lines(talk("Why?", "So."), talk("And?", "Or.")))
    second = prepare(config).train
    assert second.sources[0].path == first.sources[0].path
    assert second.sources[1].path != first.sources[1].path
    assert second.samples == 3
    assert prepare(config).cached


def test_a_transform_of_ones_own_filters_and_changes_rows_and_its_file_is_part_of_the_key(
    settings: Settings, tmp_path: Path
) -> None:
    code = "def mine(row):\n    return None if row['bad'] else {'messages': row['talk']}\n"
    (tmp_path / "mine.py").write_text(code)
    rows = [{"bad": bad, "talk": talk("Hi", "Hello.")["messages"]} for bad in (False, True)]
    config = settings({"a.jsonl": lines(*rows)}, transform=f"{tmp_path / 'mine.py'}:mine")
    summary = prepare(config)
    assert (summary.train.samples, summary.train.bad_rows) == (1, 0)
    assert "1 left out by data.transform" in summary.text()
    assert prepare(config).cached
    (tmp_path / "mine.py").write_text(code.replace("None if row['bad'] else ", ""))
    assert prepare(config).train.samples == 2
    (tmp_path / "mine.py").write_text("def mine(row):\n    return row['nothing']\n")
    with pytest.raises(UserError, match=r"2 data\.transform failed .*KeyError"):
        prepare(config)
    for name, why in (
        ("mine", "must be module:function"),
        ("nowhere:f", "ModuleNotFoundError"),
        ("json:nothing", "no"),
    ):
        config.data.transform = name
        with pytest.raises(UserError, match=rf"data\.transform: {name}.*{why}"):
            prepare(config)


def test_a_corpus_of_many_files_holds_few_open(settings: Settings) -> None:
    count = 150
    config = settings({f"{i:03}.jsonl": lines(talk("Hi", f"Hello {i}.")) for i in range(count)})
    before = psutil.Process().num_fds()
    corpus = corpus_of(prepare(config))
    assert len(corpus) == count
    assert sum(corpus.sample(i).loss_mask.sum() for i in range(count)) == corpus.part.loss_tokens
    assert corpus.place(7).endswith("007.jsonl:1")
    assert psutil.Process().num_fds() - before <= 70


def test_a_preparation_that_was_broken_off_goes_on_where_it_was(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [talk("Hi", f"Hello {i}.") for i in range(300)]
    files = {"a.jsonl": lines(*rows[:250]), "b.jsonl": lines(*rows[250:])}
    whole = corpus_of(prepare(settings(files, cache_dir=str(tmp_path / "other"))))
    monkeypatch.setattr(sys.modules["specbatch.corpus.prepare"], "KEEP_EVERY_S", 0.0)
    told: list[int] = []

    def broken_off(text: str, done: int, total: int) -> None:
        told.append(done)
        if done >= 128:
            raise KeyboardInterrupt

    config = settings(files)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, broken_off)
    again: list[int] = []
    corpus = corpus_of(prepare(config, lambda text, done, total: again.append(done)))
    assert told[-1] == 128
    assert min(done for done in again if done > 1) == 128 + 64
    assert corpus.fingerprint == whole.fingerprint
    assert corpus.loss_token_counts.tolist() == whole.loss_token_counts.tolist()
    assert [corpus.place(i).rpartition("/")[2] for i in (0, 249, 250)] == ["a.jsonl:1", "a.jsonl:250", "b.jsonl:1"]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("duplicates", ["keep", "drop"])
def test_masks_come_in_pieces_and_are_those_of_the_samples(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, duplicates: str
) -> None:
    rows = [talk("Hi", f"Hello {i % 7}.", "And?", "Or " * (i % 5)) for i in range(40)]
    config = settings({"a.jsonl": lines(*rows[:25]), "b.jsonl": lines(*rows[25:])}, duplicates=duplicates)
    corpus = corpus_of(prepare(config))
    expected = [corpus.sample(i).loss_mask for i in range(len(corpus))]
    module = sys.modules["specbatch.corpus.prepared"]
    for spans, tokens in ((1 << 16, 1 << 22), (3, 1 << 22), (1 << 16, 200), (1, 1)):
        monkeypatch.setattr(module, "SPANS_AT_ONCE", spans)
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", tokens)
        pieces = list(corpus.masks())
        assert [piece.first.sample for piece in pieces] == [0, *np.cumsum([len(p.lengths_S) for p in pieces])[:-1]]
        assert np.concatenate([piece.mask_N for piece in pieces]).tolist() == np.concatenate(expected).tolist()
        assert np.concatenate([piece.lengths_S for piece in pieces]).tolist() == corpus.lengths.tolist()
        assert max(len(piece.lengths_S) for piece in pieces) > 5 or spans < 100 or tokens < 1000

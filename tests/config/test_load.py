"""A value means the same in a file and on the command line, and a mistake is said with its place."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from specbatch.config import Config, dump_config, load_config
from specbatch.config.load import config_options
from specbatch.errors import UserError

BASE = "run: {dir: runs/a}\ntarget: {path: org/model}\ndata: {train: [a.jsonl]}\n"
NAMES = [
    "2026-11-25",
    "on",
    "0x10",
    "007",
    "1e3",
    "null",
    "yes",
    "1_000",
    "1:30",
    ".5",
    "-",
    "~",
    "kimi k2: a/b",
    "a # b",
]
"""Texts that some YAML reader interprets as a date, a boolean, a number or null."""


def write(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), "a.yaml")


def test_there_are_the_ten_sections_in_their_order():
    assert list(get_type_hints(Config)) == [
        "run", "target", "data", "draft", "training", "inference", "store", "snapshot", "evaluate", "slurm",
    ]  # fmt: skip


def test_every_field_is_documented():
    assert [name for name, option in config_options().items() if len(option.text) < 5] == []


def test_what_a_file_says_and_what_it_leaves_out(tmp_path):
    path = write(tmp_path, BASE + "training:\n  learning_rate: 1e-3\n  betas: [0.9, 0.99]\ndraft: {vocab_size: null}\n")
    config = load_config(path)
    assert (config.training.learning_rate, config.training.betas) == (1e-3, (0.9, 0.99))
    assert config.draft.vocab_size is None
    assert config.training.ranks == 1


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "1e-04"])
def test_a_small_number_is_a_number_however_it_is_written(tmp_path, text):
    in_file = load_config(write(tmp_path, BASE + f"training: {{learning_rate: {text}}}\n"))
    on_line = load_config(write(tmp_path, BASE), [f"--training.learning_rate={text}"])
    assert in_file.training.learning_rate == on_line.training.learning_rate == 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_as_it_is_written(tmp_path, name):
    quoted = name.replace("'", "''")
    plain = f"run: {{dir: r, name: {name}}}\n" if "#" not in name and ":" not in name and name != "-" else ""
    for text in filter(None, [f"run: {{dir: r, name: '{quoted}'}}\n", plain]):
        path = write(tmp_path, text + "target: {path: x}\ndata: {train: [a]}\n")
        assert load_config(path).run.name == name
    assert load_config(write(tmp_path, BASE), ["--run.name", name]).run.name == name


def test_lists_of_texts_stay_as_they_are_written(tmp_path):
    path = write(tmp_path, "run: {dir: r}\ntarget: {path: x}\ndata: {train: [007, on, 1e3], heldout: 2026-11-25}\n")
    config = load_config(path)
    assert (config.data.train, config.data.heldout) == (["007", "on", "1e3"], ["2026-11-25"])
    config = load_config(path, ["--data.train", "[010, no]", "--data.heldout", "null"])
    assert (config.data.train, config.data.heldout) == (["010", "no"], ["null"])


@pytest.mark.parametrize(
    ("text", "bytes_"), [("4GiB", 4 << 30), ("1.5 GiB", 3 << 29), ("16MiB", 16 << 20), ("20_000_000", 20_000_000)]
)
def test_memory_is_given_in_bytes_or_with_a_unit(tmp_path, text, bytes_):
    config = load_config(write(tmp_path, BASE + f"store: {{bytes_per_rank: {text}}}\n"))
    assert config.store.bytes_per_rank == bytes_
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_count_may_have_underscores(tmp_path):
    path = write(tmp_path, BASE + "training: {tokens_per_pack: 1_000}\n")
    assert load_config(path).training.tokens_per_pack == 1000
    assert load_config(path, ["--training.tokens_per_pack", "2_000"]).training.tokens_per_pack == 2000


@pytest.mark.parametrize(
    ("key", "text", "rule"),
    [
        ("training.tokens_per_pack", "0", "an integer of at least 1"),
        ("training.tokens_per_pack", "-1", "an integer of at least 1"),
        ("training.tokens_per_pack", "8k", "an integer of at least 1"),
        ("training.tokens_per_pack", "1e4", "an integer of at least 1"),
        ("training.tokens_per_pack", "true", "an integer of at least 1"),
        ("draft.ttt_steps", "0", "an integer of at least 1"),
        ("draft.step_decay", "1.5", "a number above 0 and at most 1"),
        ("training.learning_rate", "0", "a number above 0"),
        ("training.learning_rate", ".nan", "a number above 0"),
        ("training.learning_rate", ".inf", "a number above 0"),
        ("training.learning_rate", "fast", "a number above 0"),
        ("training.betas", "[0.9, 1.0]", "2 values, each a number of at least 0 and below 1"),
        ("training.betas", "0.9", "2 values, each a number of at least 0 and below 1"),
        ("training.epochs", "[1, 2]", "an integer of at least 1"),
        ("training.schedule", "step", "one of cosine, linear, wsd, constant"),
        ("data.max_bad_fraction", "2", "a number from 0 to 1"),
        ("draft.aux_layers", "[1, x, 3]", "a list, for example [1, 2], each an integer of at least 0, or null"),
        ("draft.aux_layers", "[-1, 2, 3]", "a list, for example [1, 2], each an integer of at least 0, or null"),
        ("inference.deterministic", "maybe", "true or false"),
        ("snapshot.keep", "1", "an integer of at least 2"),
        ("store.bytes_per_rank", "8k", "a number of bytes of at least 16MiB, for example 4GiB or 4294967296"),
        ("store.bytes_per_rank", "8MiB", "a number of bytes of at least 16MiB, for example 4GiB or 4294967296"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_the_rule(tmp_path, key, text, rule):
    section, name = key.split(".")
    base = "".join(line for line in BASE.splitlines(keepends=True) if not line.startswith(f"{section}:"))
    own = {"run": "  dir: r\n", "data": "  train: [a]\n"}.get(section, "")
    path = write(tmp_path, f"{base}{section}:\n{own}  {name}: {text}\n")
    line = path.read_text().count("\n")
    assert refused(path).replace('"', "") == f"a.yaml:{line}: {key}: {text} is not {rule}"
    message = refused(write(tmp_path, BASE), f"--{key}={text}")
    assert message.replace('"', "") == f"command line: {key}: {text} is not {rule}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("storre: {segment: 8G}", "a.yaml:4: storre: there is no section storre; did you mean store?"),
        ("training:\n  ranks: 2\n  lrr: 3", "a.yaml:6: training.lrr: there is no such key; did you mean training."),
        ("training: {tensor_parallel: 2}", "did you mean inference.tensor_parallel?"),
        ("learning_rate: 1", "a.yaml:4: learning_rate: there is no such key; did you mean training.learning_rate?"),
        ("slurm: {partitoin: gpu}", "slurm.partitoin: there is no such key; did you mean slurm.partition?"),
        ("slurm: {head: {memo: 4G}}", "slurm.head.memo: there is no such key; did you mean slurm.head.mem?"),
        ("training: [1]", "a.yaml:4: training: must be a mapping of keys to values"),
        ("training: {ranks: {a: 1}}", "training.ranks: a mapping is given; it must be an integer of at least 1"),
        ("training: {ranks: }", "training.ranks: no value is given; it must be an integer of at least 1"),
        ("inference: {sglang: [1]}", "inference.sglang: must be a mapping of keys to values"),
        ("inference: {sglang: {x: !thing 1}}", "inference.sglang: could not determine a constructor for the tag"),
        ("run: {dir: b}", "a.yaml:4: run is in the file twice"),
        ("store: {devices: a, devices: b}", "a.yaml:4: store.devices is in the file twice"),
        ("training: {ranks: 1", "a.yaml:5: not YAML: "),
        ("\t- x", "not YAML: "),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, text, message):
    assert message in refused(write(tmp_path, f"{BASE}{text}\n"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--training.lrr", "3"], "training.lrr: there is no such key; did you mean training.learning_rate?"),
        (["--training.ranks"], "training.ranks: has no value; it must be an integer of at least 1"),
        (["--training", "3"], "training: is a section; its keys are training.ranks, "),
        (["--data.train.x", "3"], "data.train.x: there is no such key; did you mean data.train?"),
        (["ranks=3"], "ranks=3: is not an option"),
        (["--run.dir", "a\nb"], "run.dir: a\nb is not text that is in one line and that is not empty"),
        (["--run.dir", ""], "run.dir:  is not text that is in one line and that is not empty"),
        (["--data.train", "[]"], "data.train: [] is not a list that is not empty, for example [a, b]"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(tmp_path, overrides, message):
    assert refused(write(tmp_path, BASE), *overrides).startswith(f"command line: {message}")


def test_a_field_that_must_be_given_is_asked_for(tmp_path):
    assert refused(write(tmp_path, "run: {name: x}\n")).startswith("a.yaml: run.dir: is missing: The run directory")
    assert load_config(write(tmp_path, "target: {path: x}\ndata: {train: a}\n"), ["--run.dir=r"]).data.train == ["a"]


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    assert "a.yaml: can't be read" in refused(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes(b"run: {dir: \xff}")
    assert "a.yaml: can't be read" in refused(tmp_path / "a.yaml")


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert load_config(path).data.train == [str(tmp_path / "a.jsonl")]


def test_the_command_line_overrides_the_file_and_the_last_one_wins(tmp_path):
    path = write(tmp_path, BASE + "training: {ranks: 2, packs_per_step: 4}\n")
    config = load_config(path, ["--training.ranks", "3", "--training.ranks=4", "--inference.deterministic"])
    assert (config.training.ranks, config.training.packs_per_step, config.inference.deterministic) == (4, 4, True)


def test_arguments_of_sglang_keep_their_types_and_may_be_overridden_one_by_one(tmp_path):
    block = "{a: 1e-1, b: on, c: 'on', d: 2026-11-25, e: null, f: 007, g: '1e3', h: {k: [1, '2']}, i: true, j: 1:30}"
    path = write(tmp_path, BASE + f"inference: {{sglang: {block}}}\n")
    want = {
        "a": 0.1, "b": "on", "c": "on", "d": "2026-11-25", "e": None, "f": 7, "g": "1e3", "h": {"k": [1, "2"]},
        "i": True, "j": "1:30",
    }  # fmt: skip
    assert load_config(path).inference.sglang == want
    config = load_config(path, ["--inference.sglang.a", "0.5", "--inference.sglang.chat_template", "my dir/t.jinja"])
    assert config.inference.sglang == {**want, "a": 0.5, "chat_template": "my dir/t.jinja"}


def test_paths_are_relative_to_the_file_or_to_where_the_command_stands(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    path = write(
        tmp_path / "configs",
        "run: {dir: runs/a}\ntarget: {path: ../models/tiny}\n"
        "data: {train: [../c.jsonl.gz, org/set, /x/y], cache_dir: cache}\n",
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(path)
    assert config.run.dir == str(elsewhere / "runs" / "a")
    assert config.run.name == "a"
    assert config.target.path == str(tmp_path / "models" / "tiny")
    assert config.data.train == [str(tmp_path / "c.jsonl.gz"), "org/set", "/x/y"]
    assert config.data.cache_dir == str(tmp_path / "configs" / "cache")
    config = load_config(path, ["--data.train", "mine.jsonl", "--target.path", "org/model"])
    assert config.data.train == [str(elsewhere / "mine.jsonl")]
    assert config.target.path == "org/model"


def test_benchmarks_are_found_from_where_they_are_named_and_a_sweep_is_a_section_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    text = BASE + "evaluate: {sets: {gsm8k: ../test.jsonl, other: 3}, sweep: {batch_sizes: [1, 4]}}\n"
    monkeypatch.chdir(tmp_path)
    config = load_config(write(tmp_path / "configs", text), ["--evaluate.sets.other", "mine.jsonl"])
    assert config.evaluate.sets == {"gsm8k": str(tmp_path / "test.jsonl"), "other": str(tmp_path / "mine.jsonl")}
    assert (config.evaluate.sweep.batch_sizes, config.evaluate.sweep.draft_tokens) == ([1, 4], [])
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_directory_beside_the_file_goes_before_a_hub_name(tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert load_config(write(tmp_path, BASE)).target.path == str(tmp_path / "org" / "model")


def test_hostile_paths_survive_writing_and_reading(tmp_path):
    folder = tmp_path / 'it\'s a "run" $(id) %j: #1'
    folder.mkdir()
    config = load_config(write(folder, BASE), ["--run.dir", str(folder / "{r}")])
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config
    assert again.data.train == [str(folder / "a.jsonl")]


def test_what_is_written_is_explained_if_asked_and_reads_the_same(tmp_path):
    config = load_config(write(tmp_path, BASE))
    text = dump_config(config, explain=True)
    assert "  # Passes over the corpus.\n  epochs: 1\n" in text
    assert load_config(write(tmp_path, text)) == config
    assert yaml.safe_load(dump_config(config))["training"]["learning_rate"] == 1e-4


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\x85"), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | st.sampled_from(NAMES)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(NAMES), inner, max_size=3),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("config")
    return folder, load_config(write(folder, BASE))


@settings(max_examples=25, deadline=None)
@given(name=texts | st.sampled_from(NAMES), sglang=st.dictionaries(texts | st.sampled_from(NAMES), values, max_size=3))
def test_any_configuration_reads_back_as_it_was_written(plain, name, sglang):
    folder, config = plain
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=name or "x"),
        inference=dataclasses.replace(config.inference, sglang=sglang),
    )
    again = load_config(write(folder, dump_config(config)))
    assert again == config
    assert repr(again.inference.sglang) == repr(sglang)


def test_reading_a_configuration_loads_no_torch(tmp_path):
    write(tmp_path, BASE)
    code = (
        "import sys; from pathlib import Path; from specbatch.config import load_config; "
        f"load_config(Path({str(tmp_path / 'a.yaml')!r})); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'sglang', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sources_may_be_written_with_their_weights(tmp_path: Path) -> None:
    text = BASE.replace("[a.jsonl]", "[{path: a.jsonl, weight: 2}, b.jsonl, {weight: 0.5, path: 'owner/name:train'}]")
    config = load_config(write(tmp_path, text))
    assert config.data.train == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "owner/name:train"]
    assert config.data.weights == [2.0, 1.0, 0.5]
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert load_config(write(tmp_path, BASE)).data.weights == []
    for wrong in ("[{file: a.jsonl}]", "[{path: a.jsonl, weigth: 2}]", "[[a.jsonl], {path: b.jsonl}]"):
        with pytest.raises(UserError, match=r"a\.yaml:3: data\.train: an entry is a path, or a mapping of path and"):
            load_config(write(tmp_path, BASE.replace("[a.jsonl]", wrong)))
    for weight in ("0", "-1", "much"):
        with pytest.raises(UserError, match=r"data\.weights"):
            load_config(write(tmp_path, BASE.replace("[a.jsonl]", f"[{{path: a.jsonl, weight: {weight}}}]")))


def test_columns_are_given_in_the_file_or_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, BASE.replace("[a.jsonl]", "[a.jsonl], columns: {messages: conversation}"))
    assert load_config(path).data.columns == {"messages": "conversation"}
    both = load_config(path, ["--data.columns.tools", "functions"]).data.columns
    assert both == {"messages": "conversation", "tools": "functions"}
    transform = write(tmp_path, BASE.replace("[a.jsonl]", "[a.jsonl], transform: 'mine.py:f'"))
    assert load_config(transform).data.transform == f"{tmp_path / 'mine.py'}:f"

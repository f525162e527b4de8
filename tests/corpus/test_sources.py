from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbatch.config.paths import anchored
from specbatch.corpus.conversation import decode_line
from specbatch.corpus.files import Unreadable, _elements
from specbatch.corpus.sources import HubName, find_sources
from specbatch.errors import UserError

ROWS = [{"text": "a"}, {"text": "b"}, {"text": "c"}]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def rows(*paths: Path) -> list[object]:
    return [
        decode_line(row) if isinstance(row, bytes) else row
        for source in find_sources(map(str, paths))
        for _, row in source.rows()
    ]


def _zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", _zstd)],
)
def test_lines_are_read_compressed_or_not(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"it's a.jsonl{suffix}"
    path.write_bytes(pack(LINES))
    assert rows(path) == ROWS
    (source,) = find_sources([str(path)])
    (plain := tmp_path / "plain.jsonl").write_bytes(LINES)
    assert source.scan() == find_sources([str(plain)])[0].scan()
    assert source.scan()[0] == 3


def test_line_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\n{"text": "c"}')
    (source,) = find_sources([str(path)])
    assert [number for number, _ in source.rows()] == [1, 2, 3]
    assert source.scan()[0] == 3
    assert [decode_line(row) for number, row in source.rows() if number != 2] == [{"text": "a\u2028b"}, {"text": "c"}]


def test_a_json_file_may_be_an_array_or_lines(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_bytes(LINES)
    assert rows(tmp_path / "array.json") == rows(tmp_path / "lines.json") == ROWS
    assert find_sources([str(tmp_path / "array.json")])[0].scan()[0] == 3


def test_parquet_rows_lack_what_only_other_rows_have(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    schema = pa.schema([("text", pa.string()), ("messages", pa.list_(message))])
    data = [{"text": "a"}, {"messages": [{"role": "user", "content": "x"}]}]
    pq.write_table(pa.Table.from_pylist(data, schema), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == data
    assert find_sources([str(tmp_path / "a.parquet")])[0].scan()[0] == 2


def test_a_directory_gives_its_files_by_name_and_nothing_hidden(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "sub/c.jsonl", "a.jsonl", ".hidden.jsonl", "README.md"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert rows(tmp_path) == [{"text": name} for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl")]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    for name in (tmp_path / "missing.jsonl", tmp_path / "empty", tmp_path / "a.csv"):
        with pytest.raises(UserError, match=str(name)):
            find_sources([str(name)])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINES)[:-12])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    for name in ("cut.jsonl.gz", "bad.parquet"):
        with pytest.raises(UserError, match=name):
            find_sources([str(tmp_path / name)])[0].scan()
    (tmp_path / "bad.json").write_text('[{"text": "a"},]')
    with pytest.raises(UserError, match=r"bad\.json: cannot be read"):
        find_sources([str(tmp_path / "bad.json")])[0].scan()


def test_a_subset_and_a_split_are_part_of_a_data_sets_name() -> None:
    assert HubName("squad").parts == ("squad", None, "train")
    assert HubName("owner/name").parts == ("owner/name", None, "train")
    assert HubName("owner/name:test[:10%]").parts == ("owner/name", None, "test[:10%]")
    assert HubName("owner/name/en-v1.1:validation").parts == ("owner/name", "en-v1.1", "validation")
    for name in ("owner/name:train_sft", "owner/name/subset", "owner/name/subset:train[:5]"):
        assert anchored(name, Path("/somewhere"), hub=True) == name
    assert anchored("sub/dir/file.jsonl", Path("/somewhere"), hub=True) == "/somewhere/sub/dir/file.jsonl"


def test_a_damaged_page_behind_good_ones_names_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "damaged.parquet"
    table = pa.table({"text": [f"row {i} {'x' * 40}" for i in range(2000)]})
    pq.write_table(table, path, row_group_size=500, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    place = content.index(b"row 1600 ")
    content[place - 4 : place] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    (source,) = find_sources([str(path)])
    assert source.scan()[0] == 2000
    with pytest.raises(UserError, match=r"damaged\.parquet: cannot be read from row 1537 on: "):
        list(source.rows())


def test_damage_that_leaves_text_readable_is_found_by_the_checksum_of_its_page(tmp_path: Path) -> None:
    path = tmp_path / "changed.parquet"
    table = pa.table({"text": [f"row number {i}" for i in range(1000)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"row number 700", b"row nomber 700"))
    with pytest.raises(UserError, match=r"changed\.parquet: cannot be read from row \d+ on: .*checksum"):
        rows(path)


def test_a_value_that_cannot_be_decoded_costs_its_row_and_only_where_it_is_read(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe", b"good"], pa.binary()).cast(pa.string(), safe=False)
    table = pa.table({"text": texts, "other": pa.array(["a", "b", "c"])})
    pq.write_table(table, tmp_path / "a.parquet")
    (source,) = find_sources([str(tmp_path / "a.parquet")], ["other"])
    assert [row for _, row in source.rows()] == [
        {"text": "good", "other": "a"},
        {"other": "b"},
        {"text": "good", "other": "c"},
    ]
    (source,) = find_sources([str(tmp_path / "a.parquet")], ["text"])
    bad = [row for _, row in source.rows()][1]
    assert isinstance(bad, Unreadable)
    assert "column text" in bad.why


@pytest.mark.parametrize("depth", [2900, 60_000])
def test_arrays_that_are_nested_too_deeply_are_named(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "deep.json"
    path.write_text('[{"text": "a"}, ' + "[" * depth + "]" * depth + "]")
    with pytest.raises(UserError, match=r"deep\.json: cannot be read from row 2 on: nested too deeply"):
        find_sources([str(path)])[0].scan()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_an_array_is_read_in_pieces_as_it_would_be_read_whole(values, indent, ascii_only, block) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    found = [json.loads(element) for element in _elements(io.StringIO(text), block)]
    assert repr(found) == repr(json.loads(text))
    for wrong in (text[:-1], text + "x", text[:-1] + ",]", "{}"):
        with pytest.raises(ValueError, match=r"."):
            list(_elements(io.StringIO(wrong), block))


def test_a_name_that_is_no_path_is_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data" / "train.parquet")
    source = HubName(str(tmp_path / "data"))
    assert source.scan()[0] == 3
    assert [row for _, row in source.rows()] == ROWS
    assert HubName(str(tmp_path / "data")).scan() == source.scan()
    with pytest.raises(UserError, match="nowhere"):
        HubName(f"{tmp_path / 'data'}:nowhere").scan()
    with pytest.raises(UserError, match="json: neither a file, nor a directory, nor a name"):
        find_sources(["json"])[0].scan()

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specbatch.corpus.conversation import decode_line
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

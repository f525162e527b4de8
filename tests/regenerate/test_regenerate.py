"""The target's own answers, by the real engine: the same whatever is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specbatch.config import load_config
from specbatch.corpus.conversation import Conversation
from specbatch.corpus.samples import Converter
from specbatch.corpus.tokenizer import end_ids, load_tokenizer
from specbatch.errors import UserError
from specbatch.rundir import read_json
from specbatch.verbs.regenerate import regenerate

ROWS: list[Any] = [
    {
        "messages": [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "?"},
        ]
    },
    {"id": 2, "prompt": "Write a very long story about a dragon."},
    "broken",
    *({"id": number, "prompt": f"What is {number} and {number}?"} for number in range(3, 9)),
]


def words(target: Path, rows: Path, run: Path, *more: str) -> list[str]:
    rows.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in ROWS))
    return ["--target", str(target), "--input", str(rows), "--output", str(run), "--threads", "1", *more]


def command(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which ends all that it has started."""
    line = [sys.executable, "-m", "specbatch", "regenerate", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def shards(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "answers").glob("*.jsonl"))}


def test_what_is_missing_or_no_run_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input: is missing"):
        regenerate(["--target", "x", "--output", str(tmp_path / "run")])
    with pytest.raises(UserError, match="is the name of a file; give a run directory"):
        regenerate(words(tmp_path, tmp_path / "in.jsonl", tmp_path / "out.jsonl"))


@pytest.mark.light
def test_a_run_that_was_stopped_gives_the_same_bytes_and_data_reads_them(smollm: Path, tmp_path: Path) -> None:
    more = ["--max_new_tokens", "12", "--unfinished", "keep", "--batch_size", "1", "--rows_per_shard", "4"]
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    done = command(words(smollm, tmp_path / "in.jsonl", calm, *more))
    assert done.returncode == 0, done.stdout + done.stderr
    whole = shards(calm)
    status = read_json(calm / "status.json")
    assert (status["state"], status["stage"], status["step"], status["steps"]) == ("completed", "done", 9, 9)
    assert (status["answers"]["written"], status["answers"]["refused"]) == (8, {"not JSON": 1})
    assert list(whole) == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]

    arguments = words(smollm, tmp_path / "in.jsonl", stopped, *more)
    with subprocess.Popen([sys.executable, "-m", "specbatch", "regenerate", *arguments]) as run:
        opened = stopped / "shards" / "open"
        wait_for(lambda: sum(path.read_bytes().count(b"\n") for path in opened.glob("*")) > 1 or shards(stopped), run)
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 75
    assert read_json(stopped / "status.json")["state"] == "stopped"
    assert shards(stopped) != whole
    # The same command goes on; it may say no other data or target.
    other = command([*arguments, "--seed", "1"])
    assert (other.returncode, "run.seed was 0 and would be 1" in other.stderr) == (2, True)
    done = command(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert shards(stopped) == whole

    rows = [json.loads(line) for content in whole.values() for line in content.splitlines()]
    assert [row.get("id") for row in rows] == [None, *range(2, 9)]
    assert rows[0]["messages"][-1] == {"role": "assistant", "content": "The capital of France is Paris."}
    config = load_config(calm / "config.yaml")
    converter = Converter(load_tokenizer(config), end_ids(config), config.data, False, lambda mask: bool(mask.any()))
    for row in rows:
        converted = converter.convert("row", row)
        assert len(converted.samples) == 1
        template = converter.template
        asked = template.encode(template.render(Conversation(row["messages"][:-1]), prompt=True))[0]
        ids, mask = converted.samples[0]
        assert ids[: len(asked)].tolist() == asked.tolist()
        assert not mask[: len(asked)].any()


def wait_for(done: Callable[[], Any], run: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 240
    while not done():
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)

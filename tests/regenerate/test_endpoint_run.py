"""A run whose engines ask a server elsewhere: whoever is killed and whoever joins, each answer is there once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from specbatch.config import dump_config, load_config
from specbatch.corpus import open_corpus
from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import read
from specbatch.regenerate import engine
from specbatch.run.answering import answers_first
from specbatch.run.attempts import begin_attempt
from specbatch.run.components import packs_are_claimed
from specbatch.run.prepare import prepare_prompts
from specbatch.rundir import RunDir, read_json, write_whole

ROWS = 60
DELAY_S = 0.25


@pytest.fixture
def url() -> Iterator[str]:
    """A server of OpenAI's protocol that repeats the question, a little later."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(DELAY_S)
            message = {"role": "assistant", "content": f"You ask: {asked['messages'][-1]['content']}"}
            endless = "Endless" in asked["messages"][-1]["content"]
            choice = {"finish_reason": "length" if endless else "stop", "message": message}
            body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 4}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}/v1"
        made.shutdown()


def kept(run: Path) -> int:
    """Answers that are kept, in whole shards or not."""
    files = [*(run / "answers").glob("*.jsonl"), *(run / "shards" / "open").glob("*.jsonl")]
    return sum(path.read_bytes().count(b"\n") for path in files if path.exists())


def kill(run: Path, attempt: int, component: str) -> None:
    log = run / "attempts" / str(attempt) / "logs" / f"{component}-0.log"
    os.kill(int(re.findall(r"started pid=(\d+)", log.read_text())[-1]), signal.SIGKILL)


def wait_until(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 180
    while not done():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.light
def test_whatever_is_killed_each_prompt_is_answered_once(tiny_target: Path, url: str, tmp_path: Path) -> None:
    run, rows = tmp_path / "run", tmp_path / "in.jsonl"
    rows.write_text("".join(json.dumps({"id": number, "prompt": f"Is it {number}?"}) + "\n" for number in range(ROWS)))
    words = [sys.executable, "-m", "specbatch", "regenerate", "--target", str(tiny_target), "--input", str(rows)]
    words += ["--output", str(run), "--endpoint", url, "--model", "x", "--batch_size", "1", "--rows_per_shard", "20"]
    words += ["--inference.heartbeat_s", "0.5"]

    def start(*command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with start(*words) as first:
        wait_until(lambda: kept(run) > 5, first)
        kill(run, 1, "inference")
        before = kept(run)
        wait_until(lambda: kept(run) > before + 5, first)
        kill(run, 1, "head")
        wait_until(lambda: (run / "attempts" / "2" / "rendezvous.json").exists(), first)
        joined = start(sys.executable, "-m", "specbatch", "engine", str(run))
        said, _ = first.communicate(timeout=240)
        assert first.returncode == 0, said
        assert joined.wait(timeout=60) == 0, joined.communicate()[0]
    assert f"{ROWS} conversations of {ROWS} in " in said.splitlines()[-1]
    shards = sorted((run / "answers").glob("*.jsonl"))
    answers = [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]
    assert [path.name for path in shards] == [f"{number:05d}.jsonl" for number in range(-(-ROWS // 20))]
    assert [answer["id"] for answer in answers] == list(range(ROWS))
    assert all(answer["messages"][1]["content"] == f"You ask: Is it {answer['id']}?" for answer in answers)
    assert not list((run / "shards" / "open").iterdir())
    status = [sys.executable, "-m", "specbatch", "status", str(run)]
    told = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    assert f"completed, step {ROWS} of {ROWS}" in told
    assert f"answers   {ROWS} of {ROWS} written; {ROWS} as served" in told


LEAD = "import pathlib, sys; from specbatch.run import components; components.head(pathlib.Path(sys.argv[1]), 1)"


def begun(tiny_target: Path, url: str, folder: Path, words: str) -> RunDir:
    """The first attempt of a run that answers six prompts twice before it trains, which nothing works on yet."""
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_text("".join(json.dumps({"prompt": f"{words} {n}?"}) + "\n" for n in range(6)))
    (folder / "run.yaml").write_text(
        f"""
run: {{dir: {folder / "run"}}}
target: {{path: {tiny_target}}}
data: {{train: [in.jsonl], max_tokens: 128, cache_dir: cache, workers: 1,
  regenerate: {{answers: 2, rows_per_shard: 4, endpoint: "{url}", model: x}}}}
draft: {{ttt_steps: 2, vocab_size: 64}}
training: {{tokens_per_pack: 128, packs_per_step: 1, max_steps: 2, warmup_steps: 1}}
inference: {{heartbeat_s: 0.5}}
store: {{bytes_per_rank: 32MiB}}
evaluate: {{prompts: 0}}
"""
    )
    config = load_config(folder / "run.yaml")
    run_dir = RunDir(Path(config.run.dir))
    run_dir.make()
    write_whole(run_dir.config, dump_config(config).encode())
    prepare_prompts(run_dir, config)
    run_dir.attempt(1).mkdir(parents=True)
    begin_attempt(run_dir, 1)
    return run_dir


@pytest.mark.light
def test_a_run_may_answer_its_prompts_before_it_trains_on_them(tiny_target: Path, url: str, tmp_path: Path) -> None:
    run_dir = begun(tiny_target, url, tmp_path, "Is it")
    config = load_config(run_dir.config)
    with subprocess.Popen([sys.executable, "-c", LEAD, str(run_dir.root)]) as head:
        try:
            assert answers_first(run_dir, config)
            engine.main(run_dir, 1, 0)
            # The head writes the last shard a little after the last answer.
            assert packs_are_claimed(run_dir, 1, config)
            assert not answers_first(run_dir, config)
            corpus = open_corpus(run_dir)
            assert (len(corpus), corpus.place(11)) == (12, f"{run_dir.answers / '00001.jsonl'}:4")
            with contextlib.closing(Client(read(run_dir.rendezvous(1), 1))) as client:  # type: ignore[arg-type]
                report = client.status()
            assert (report.step, report.steps, report.ranks) == (0, 2, 0)
            # What became of the prompts stays in the status, and stands in the log.
            until = time.monotonic() + 30
            while (status := read_json(run_dir.status))["stage"] != "starting" and time.monotonic() < until:
                time.sleep(0.05)
            assert (status["stage"], status["steps"], status["answers"]["written"]) == ("starting", 2, 12)
            assert "12 of 12 prompts have an answer\n" in run_dir.log.read_text()
        finally:
            head.kill()


@pytest.mark.light
def test_a_run_without_any_answer_has_nothing_to_train_on(tiny_target: Path, url: str, tmp_path: Path) -> None:
    run_dir = begun(tiny_target, url, tmp_path, "Endless")
    with subprocess.Popen([sys.executable, "-c", LEAD, str(run_dir.root)]) as head:
        engine.main(run_dir, 1, 0)
        assert head.wait(60) != 0
    status = read_json(run_dir.status)
    assert status["state"] == "failed"
    assert status["why"] == (
        "there is nothing to train on: 0 of 12 prompts have an answer; the others: 12 an answer without an end; "
        "raise data.regenerate.max_new_tokens, or set data.regenerate.unfinished: keep"
    )

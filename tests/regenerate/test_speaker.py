"""Requests to the target: sampling, seeds, thinking, and other servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from specbatch.config import Config, Data, Run, Target
from specbatch.config.answers import Regenerate
from specbatch.dispatch.messages import Prompt
from specbatch.errors import UserError
from specbatch.inference.server import EngineError, RequestRefused
from specbatch.regenerate import voices
from specbatch.regenerate.speaker import Question, Said, Speaker, answer_seed, sampling
from specbatch.regenerate.voices import KEY, Endpoint
from tests.corpus.templates import turns, with_template


@pytest.fixture
def target(tiny_target: Path, tmp_path: Path) -> Path:
    """A copy of the tiny target, to be changed."""
    folder = tmp_path / "target"
    folder.mkdir()
    for file in tiny_target.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def config(target: Path, data: dict[str, Any] | None = None, **asked: Any) -> Config:
    return Config(Run(dir="run"), Target(str(target)), Data(train=[], regenerate=Regenerate(**asked), **(data or {})))


def prompt(*said: str, number: int = 1, **row: Any) -> Prompt:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return Prompt(7, (number, 0), f"in:{number}", json.dumps({"messages": messages, **row}).encode())


class Echo:
    """Answers with the text that it is given, and ends; keeps what it was asked."""

    def __init__(self, speaker: Speaker, *texts: str) -> None:
        self._template, self._texts, self.asked = speaker._converter.template, list(texts), list[Question]()

    def say(self, question: Question) -> Said:
        self.asked.append(question)
        ids = [int(token) for token in self._template.encode(self._texts[len(self.asked) - 1])[0]]
        return Said(len(ids), ids)


def test_each_answer_has_a_seed_of_its_own() -> None:
    places = [(s, row, answer, turn) for s in range(3) for row in range(40) for answer in range(3) for turn in range(4)]
    seeds = {answer_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 1 << 31 for seed in seeds)


def test_all_tokens_that_end_an_answer_are_known(target: Path) -> None:
    (target / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert Speaker(config(target)).stop_ids == [0, 2]


def test_answers_are_sampled_as_the_target_is_served_unless_it_is_said(target: Path) -> None:
    file = target / "generation_config.json"
    file.write_text('{"eos_token_id": 2}')
    assert sampling(config(target)) == {"temperature": 0.0}
    file.write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20}')
    assert sampling(config(target)) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert sampling(config(target, temperature=0.0, top_p=0.5)) == {"temperature": 0.0, "top_p": 0.5, "top_k": 20}
    file.write_text('{"do_sample": false, "temperature": 0.6, "repetition_penalty": 1.1}')
    assert sampling(config(target)) == {"temperature": 0.0, "repetition_penalty": 1.1}


def test_all_turns_are_answered_anew_and_other_keys_stay(target: Path) -> None:
    speaker = Speaker(config(target))
    echo = Echo(speaker, "One.<|im_end|>", "Two.<|im_end|>", "Three.<|im_end|>")
    answer = speaker.answer(prompt("a", "old", "b", "old", "c", id=5), echo)
    row = json.loads(answer.row)
    assert (row["id"], answer.ways, answer.reason) == (5, ("text",) * 3, "")
    assert [m["content"] for m in row["messages"]] == ["a", "One.", "b", "Two.", "c", "Three."]
    assert len({question.seed for question in echo.asked}) == 3


def test_a_question_that_cannot_be_encoded_is_left_out(target: Path) -> None:
    speaker = Speaker(config(target))
    answer = speaker.answer(prompt("half \ud83d a character"), Echo(speaker))
    assert (answer.row, answer.reason) == (b"", "lone surrogate")


def test_a_servers_call_has_its_arguments_as_text_and_is_checked_as_data_reads_it(target: Path) -> None:
    function = {"name": "tide", "arguments": '{"port": "Brest"}'}
    message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    class Server:
        def say(self, question: Question) -> Said:
            return Said(5, None, message)

    arguments = "{% for k, v in c.function.arguments.items() %}{{ k + '=' + v }}{% endfor %}"
    with_template(
        target,
        turns(f"<|im_start|>{{% for c in m.tool_calls or [] %}}{arguments}{{% endfor %}}<|im_end|>", "<|im_start|>"),
    )
    answer = Speaker(config(target)).answer(prompt("Tide?"), Server())
    assert answer.reason == ""
    assert json.loads(answer.row)["messages"][1] == message


def test_an_answer_without_an_end_is_left_out_or_kept_with_a_mark(target: Path) -> None:
    speaker = Speaker(config(target))
    answer = speaker.answer(prompt("a"), Echo(speaker, "It goes"))
    assert (answer.row, answer.reason, answer.detail) == (b"", "an answer without an end", "in:1")
    assert answer.tokens > 0
    speaker = Speaker(config(target, unfinished="keep"))
    row = json.loads(speaker.answer(prompt("a", "old", "b"), Echo(speaker, "It goes")).row)
    assert [m.get("finish_reason") for m in row["messages"]] == [None, "length"]


def test_a_share_of_the_answers_is_thought_about_and_each_row_says_so(target: Path) -> None:
    with pytest.raises(UserError, match="the target's chat template has none of enable_thinking and thinking"):
        Speaker(config(target, thinking=0.5))
    settings = json.loads((target / "tokenizer_config.json").read_text())
    settings["chat_template"] += "{% if add_generation_prompt and enable_thinking is false %}<think></think>{% endif %}"
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    speaker, thought = Speaker(config(target, thinking=0.25)), 0
    for number in range(200):
        echo = Echo(speaker, "Yes.<|im_end|>")
        row = json.loads(speaker.answer(prompt("a", number=number), echo).row)
        thinks = row["chat_template_kwargs"]["enable_thinking"]
        text = speaker._converter.template.tokenizer.decode(echo.asked[0].ids)
        assert text.endswith("<think></think>") != thinks
        thought += thinks
    assert 30 < thought < 70


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]], list[Any]]]:
    """A server of OpenAI's protocol: its URL, what it was asked, and what it says, the last one again and again."""
    asked: list[dict[str, Any]] = []
    answers: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def _reply(self, status: int, content: Any) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            asked.append({"path": self.path, "key": self.headers.get("Authorization")})
            self._reply(200, {"data": [{"id": "the-target"}]})

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._reply(*(answers.pop(0) if len(answers) > 1 else answers[0]))

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}/v1", asked, answers
        made.shutdown()


def reply(content: str, finish: str = "stop", **message: Any) -> tuple[int, Any]:
    choice = {"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return 200, {"choices": [choice], "usage": {"completion_tokens": 3}}


def test_any_server_of_openais_protocol_answers(
    target: Path, server: tuple[str, list[dict[str, Any]], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked, answers = server
    monkeypatch.setenv(KEY, "secret")
    settings = config(target, endpoint=url, temperature=0.5, unfinished="keep", max_new_tokens=9)
    speaker = Speaker(settings)
    answers += [reply("Sea."), reply("Long", "length")]
    with Endpoint(settings) as endpoint:
        answer = speaker.answer(prompt("Where?", "old", "Why?"), endpoint)
    assert asked[0] == {"path": "/v1/models", "key": "Bearer secret"}
    assert asked[1].pop("seed") != asked[2].pop("seed")
    assert asked[1] == {
        "model": "the-target",
        "messages": [{"role": "user", "content": "Where?"}],
        "max_tokens": 9,
        "temperature": 0.5,
    }
    assert [m["content"] for m in asked[2]["messages"]] == ["Where?", "Sea.", "Why?"]
    row = json.loads(answer.row)
    assert row["messages"][3] == {"role": "assistant", "content": "Long", "finish_reason": "length"}
    assert (answer.ways, answer.tokens) == (("served", "served"), 6)


def test_what_a_server_does_wrong_is_told_apart(
    target: Path, server: tuple[str, list[dict[str, Any]], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _, answers = server
    monkeypatch.setattr(voices, "PAUSE_S", 0.0)
    settings = config(target, endpoint=url, model="x")
    speaker = Speaker(settings)
    with Endpoint(settings) as endpoint:
        for status, error, words in (
            (400, RequestRefused, "HTTP 400"),
            (503, EngineError, "HTTP 503"),
            (401, UserError, "rejects the key in OPENAI_API_KEY"),
        ):
            answers[:] = [(status, {"error": "no"})]
            with pytest.raises(error, match=words):
                speaker.answer(prompt("Where?"), endpoint)
        for wrong in ({"error": "no"}, {"choices": []}, {"choices": [{"message": None}]}, ["x"], None):
            answers[:] = [(200, wrong)]
            with pytest.raises(EngineError, match="no chat completion, but"):
                speaker.answer(prompt("Where?"), endpoint)
        answers[:] = [(200, b"<html>")]
        with pytest.raises(EngineError, match="no JSON, but '<html>'"):
            speaker.answer(prompt("Where?"), endpoint)

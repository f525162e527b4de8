"""Sources of the target's answers: an own SGLang engine, or any server with OpenAI's API."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.inference.arguments import engine_dtype
from specbatch.inference.server import EngineError, RequestRefused, SGLangServer
from specbatch.regenerate.speaker import Question, Said

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
"""Environment variable with the endpoint's key."""
REQUEST_TIMEOUT_S = 3600.0
"""Timeout of a request: an answer arrives as a whole, and many others are generated at the same time."""
TRIES, PAUSE_S = 4, 0.5
"""Tries with an endpoint that does not answer or is busy, and seconds after the first failed one; later pauses are
longer."""
_NOT_THE_SERVERS = ("reasoning_parser", "tool_call_parser")
"""Settings of ``inference.sglang`` that are applied here to the tokens, and not passed to the server."""


class OwnEngine:
    """An own SGLang server; a context manager that starts and ends it.

    Args:
        log: SGLang's log file.
        max_tokens: tokens of the longest conversation.
    """

    def __init__(self, config: Config, log: Path, max_tokens: int, start_timeout_s: float) -> None:
        inference = config.inference
        arguments: dict[str, Any] = {
            "model_path": config.target.path,
            "dtype": engine_dtype(config),
            "trust_remote_code": config.target.trust_remote_code,
            "tp_size": inference.tensor_parallel,
            "skip_tokenizer_init": True,
            "context_length": max_tokens,
            "max_running_requests": config.data.regenerate.batch_size,
            "random_seed": config.run.seed,
        }
        given = {name: value for name, value in inference.sglang.items() if name not in _NOT_THE_SERVERS}
        self._server = SGLangServer(arguments | given, log, threads=inference.threads, start_timeout_s=start_timeout_s)

    def __enter__(self) -> OwnEngine:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop()

    def say(self, question: Question) -> Said:
        """Return the answer's tokens. Raises the same as `SGLangServer.generate`."""
        parameters = {
            **question.sampling,
            "max_new_tokens": question.max_new_tokens,
            "stop_token_ids": question.stop_ids,
            "sampling_seed": question.seed,
        }
        request = {"input_ids": question.ids.tolist(), "sampling_params": parameters}
        ids = self._server.generate(request, REQUEST_TIMEOUT_S)["output_ids"]
        return Said(len(ids), ids)

    def alive(self) -> bool:
        """Return whether its process runs."""
        return self._server.alive()

    def stop(self) -> None:
        """End the server; callable from any thread."""
        self._server.stop()


class Endpoint:
    """A server of somebody else at a URL; a context manager like `OwnEngine`.

    Raises:
        UserError: it rejects the key, or does not say what it serves.
    """

    def __init__(self, config: Config) -> None:
        self._asked = config.data.regenerate
        self._url = self._asked.endpoint.rstrip("/")
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=self._asked.batch_size))
        if key := os.environ.get(KEY):
            self._session.headers["Authorization"] = f"Bearer {key}"
        self._model = self._asked.model

    def __enter__(self) -> Endpoint:
        if not self._model:
            found = self._ask("GET", "/models")
            try:
                names = [str(each["id"]) for each in found["data"]]
            except (LookupError, TypeError) as error:
                raise EngineError(f"{self._url}/models: no list of models, but {str(found)[:200]}") from error
            if len(names) != 1:
                raise UserError(
                    f"data.regenerate.model: is missing, and {self._url} serves {', '.join(names) or 'nothing'}; "
                    "name one"
                )
            self._model = names[0]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()

    def say(self, question: Question) -> Said:
        """Return the answer as the server has parsed it."""
        conversation = question.conversation
        body: dict[str, Any] = {
            "model": self._model,
            "messages": conversation.messages,
            "max_tokens": question.max_new_tokens,
        }
        # Omitted parameters keep the server's defaults, which should be the model's.
        given = {"temperature": self._asked.temperature, "top_p": self._asked.top_p}
        body |= {name: value for name, value in given.items() if value is not None}
        body |= {"seed": question.seed} if self._asked.temperature != 0 else {}
        body |= {"tools": conversation.tools} if conversation.tools else {}
        body |= {"chat_template_kwargs": conversation.variables} if conversation.variables else {}
        found = self._ask("POST", "/chat/completions", json=body)
        wanted = ("role", "content", "reasoning_content", "reasoning", "tool_calls")
        try:
            choice = found["choices"][0]
            message = {name: choice["message"][name] for name in wanted if choice["message"].get(name)}
            tokens = int((found.get("usage") or {}).get("completion_tokens") or 0)
            finished = choice["finish_reason"] != "length"
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise EngineError(f"{self._url}: no chat completion, but {str(found)[:200]}") from error
        return Said(tokens, None, {"content": "", **message, "role": "assistant"}, finished)

    def alive(self) -> bool:
        """Return true: only a request shows whether an endpoint works."""
        return True

    def stop(self) -> None:
        """Do nothing: the server belongs to somebody else."""

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        for tried in range(1, TRIES):
            try:
                return self._ask_once(method, path, **options)
            except EngineError as error:
                logger.warning("endpoint did not answer tried=%d of=%d why=%s", tried, TRIES, error)
                time.sleep(PAUSE_S * tried)
        return self._ask_once(method, path, **options)

    def _ask_once(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = self._session.request(method, self._url + path, timeout=(10.0, REQUEST_TIMEOUT_S), **options)
        except requests.RequestException as error:
            raise EngineError(f"{self._url}: {error}") from error
        if answer.status_code in (401, 403):
            raise UserError(f"data.regenerate.endpoint: {self._url} rejects the key in {KEY}: {answer.text[:200]}")
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise EngineError(f"{self._url}: HTTP {answer.status_code}: {answer.text[:200]}")
        if answer.status_code != 200:
            raise RequestRefused(f"HTTP {answer.status_code}: {answer.text[:500]}")
        try:
            return answer.json()
        except ValueError as error:
            raise EngineError(f"{self._url}{path}: no JSON, but {answer.text[:200]!r}") from error

"""Has conversations with the target: builds its prompts, and writes its answers as messages."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from specbatch.config import Config
from specbatch.corpus.conversation import Conversation, Rejected, read_row
from specbatch.corpus.forms import VARIABLES, RowReader
from specbatch.corpus.mask import encodable
from specbatch.corpus.samples import Converter
from specbatch.corpus.tokenizer import end_ids, load_tokenizer
from specbatch.dispatch.messages import Answer, Prompt
from specbatch.errors import UserError
from specbatch.pack_manifest import PackId
from specbatch.regenerate.fit import UNFINISHED, Fit, Message
from specbatch.regenerate.parsers import Parsers
from specbatch.regenerate.rows import questions
from specbatch.rundir import read_json
from specbatch.target import locate

CONTEXT_RESERVE = 8
"""Positions that SGLang keeps for itself at the end of its context."""
THINKING = ("enable_thinking", "thinking")
"""Template variables that turn thinking on or off."""
UNENDED = "an answer without an end"
"""Reason of a prompt whose answer a limit cut off."""
SERVED = "served"
"""The way of writing an answer that a server has parsed itself, so that its tokens are unknown."""


@dataclass(frozen=True)
class Question:
    """The request for one answer of the target."""

    conversation: Conversation
    ids: np.ndarray
    """Token ids of the prompt, int32."""
    sampling: dict[str, Any]
    """Sampling parameters by SGLang's names."""
    max_new_tokens: int
    stop_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Said:
    """One answer of the target."""

    tokens: int
    ids: list[int] | None = None
    """Token ids, including the end token; None if the server returns only text."""
    message: Message | None = None
    """The message from such a server."""
    finished: bool = True


class Voice(Protocol):
    """A source of the target's answers."""

    def say(self, question: Question) -> Said:
        """Return the answer. Raises `EngineError`, or `RequestRefused` for this question alone."""
        ...


class Speaker:
    """Answers rows of the input; thread-safe.

    Raises:
        UserError: the target can't be read, or can't answer as the configuration says.
    """

    def __init__(self, config: Config) -> None:
        from transformers import AutoConfig

        self._config, self._asked = config, config.data.regenerate
        folder = locate(config.target.path)
        tokenizer = load_tokenizer(config)
        try:
            model = AutoConfig.from_pretrained(
                folder, trust_remote_code=config.target.trust_remote_code, local_files_only=True
            ).get_text_config()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"target.path: {config.target.path} cannot be read: {error}") from error
        positions = model.max_position_embeddings
        self.max_tokens: int = min(self._asked.max_tokens or positions, positions)
        named = (tokenizer.eos_token_id, model.eos_token_id, *end_ids(config))
        self.stop_ids = sorted({token for entry in named for token in _as_list(entry)})
        if not self.stop_ids:
            raise UserError(
                f"target.path: {config.target.path} names no token that ends an answer; set eos_token_id in its "
                "config.json"
            )
        self.sampling = sampling(config)
        self._reader = RowReader(config.data)
        self._converter = Converter(tokenizer, end_ids(config), config.data, False, lambda mask: bool(mask.any()))
        self._parsers = Parsers(self._converter.template, config.inference.sglang)
        self._switches = self._thinking_switches()

    def answer(self, prompt: Prompt, voice: Voice) -> Answer:
        """Return the result of a prompt.

        Raises:
            EngineError: the engine or endpoint broke.
            RequestRefused: it refused the question.
        """
        ways: list[str] = []
        tokens = [0]
        try:
            conversation, other = questions(self._reader, prompt.row)
            found = self._converse(conversation, prompt.prompt, voice, ways, tokens)
        except Rejected as problem:
            return Answer(
                prompt.claim,
                prompt.prompt,
                reason=problem.reason,
                detail=f"{prompt.place}: {problem.detail}".removesuffix(": "),
                tokens=tokens[0],
            )
        row: dict[str, Any] = {**other, "messages": found.messages}
        row |= {"tools": found.tools} if found.tools else {}
        row |= {VARIABLES: found.variables} if found.variables else {}
        row |= {"answer": prompt.prompt[1]} if self._asked.answers > 1 else {}
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", errors="replace")
        return Answer(prompt.claim, prompt.prompt, line, ways=tuple(ways), tokens=tokens[0])

    def _converse(
        self, asked: Conversation, prompt: PackId, voice: Voice, ways: list[str], tokens: list[int]
    ) -> Conversation:
        """Return the conversation with the target's answers.

        Args:
            ways, tokens: extended by how each answer is written, and by the number of generated tokens.

        Raises:
            Rejected: the conversation can't be answered; says why.
        """
        variables = asked.variables | self._switched(prompt)
        history = replace(asked, messages=[], variables=variables)
        said: dict[int, list[int]] = {}
        fit = Fit(self._converter.given(variables), self._parsers)
        turns = [*asked.messages] if asked.messages[-1]["role"] == "assistant" else [*asked.messages, {}]
        for message in turns:
            if message.get("role", "assistant") == "assistant":
                message = self._turn(fit, history, prompt, voice, said, ways, tokens)
            history = replace(history, messages=[*history.messages, message])
            if UNFINISHED.items() <= message.items() or "tool_calls" in message:
                break  # the reply to that is unknown
        return fit.kept(history, said) if len(said) == len(history.assistant_turns) else history

    def _turn(
        self,
        fit: Fit,
        history: Conversation,
        prompt: PackId,
        voice: Voice,
        said: dict[int, list[int]],
        ways: list[str],
        tokens: list[int],
    ) -> Message:
        template = fit.converter.template
        text = template.render(history, prompt=True)
        encodable(text)
        ids, _ = template.encode(text)
        room = self.max_tokens - len(ids) - CONTEXT_RESERVE
        if room < 1:
            raise Rejected("longer than max_tokens")
        number = len(history.messages)
        seed = answer_seed(self._config.run.seed, *prompt, number)
        most = min(self._asked.max_new_tokens, room)
        answer = voice.say(Question(history, ids, self.sampling, most, self.stop_ids, seed))
        tokens[0] += answer.tokens
        finished = answer.finished if answer.ids is None else bool(answer.ids) and answer.ids[-1] in self.stop_ids
        if not finished and self._asked.unfinished == "skip":
            raise Rejected(UNENDED)
        if answer.ids is None:
            assert answer.message is not None
            message = {**answer.message, **({} if finished else UNFINISHED)}
            # Servers write the arguments of calls as text, which templates do not accept.
            read = read_row({"messages": [message]}, "messages")
            assert isinstance(read, Conversation)
            fit.converter.turn(replace(history, messages=[*history.messages, *read.messages]), number)
            ways.append(SERVED)
            return message
        message, way = fit.message(history, ids, answer.ids, finished)
        ways.append(way)
        said[number] = answer.ids
        return message

    def _thinking_switches(self) -> list[str]:
        """Return the variables that turn thinking on or off in the target's template; none if not configured."""
        if self._asked.thinking is None:
            return []
        source = self._converter.template.source(None)
        found = [name for name in THINKING if re.search(rf"\b{name}\b", source)]
        if not found:
            raise UserError(
                f"data.regenerate.thinking: {self._asked.thinking:g} is set, but the target's chat template has "
                f"none of {' and '.join(THINKING)}; leave it out, or set data.template_variables by its own names"
            )
        return found

    def _switched(self, prompt: PackId) -> dict[str, Any]:
        share = self._asked.thinking
        if share is None:
            return {}
        return dict.fromkeys(self._switches, answer_seed(self._config.run.seed, *prompt, -1) < share * (1 << 31))


def sampling(config: Config) -> dict[str, Any]:
    """Return sampling parameters by SGLang's names: from the configuration, else the target's generation settings."""
    asked = config.data.regenerate
    of_target = read_json(locate(config.target.path) / "generation_config.json") or {}
    samples = of_target.get("do_sample", any(name in of_target for name in ("temperature", "top_p", "top_k")))
    theirs = float(of_target.get("temperature") or 1.0) if samples else 0.0
    found: dict[str, Any] = {"temperature": theirs if asked.temperature is None else asked.temperature}
    for name, given in (("top_p", asked.top_p), ("top_k", asked.top_k)):
        value = of_target.get(name) if given is None and samples else given
        found |= {name: value} if value else {}
    for name in ("min_p", "repetition_penalty"):
        found |= {name: of_target[name]} if of_target.get(name) else {}
    return found


def _as_list(ids: int | list[int] | None) -> list[int]:
    """Return the token ids that a model names (none, one or several) as a list."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def answer_seed(seed: int, row: int, answer: int, message: int) -> int:
    """Return a seed for each answer, independent of who computes it and when; 31 bits."""
    digest = hashlib.blake2b(f"{seed}/{row}/{answer}/{message}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1

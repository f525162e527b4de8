"""A row becomes samples: tokens and the loss mask, or the reasons why not.

This is all the work of preparation, so that it can be done by any process in any order with the same result.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from specbatch.capture import CaptureContract
from specbatch.config import Data
from specbatch.corpus.conversation import Conversation, PlainText, Rejected, decode_line, read_row
from specbatch.corpus.mask import answer_spans
from specbatch.corpus.sources import Row
from specbatch.corpus.template import Template

_LEARNT = CaptureContract(aux_layers=(0,), hidden=1)
"""Says which rows of a sample teach anything; that does not depend on the target."""


@dataclass
class Converted:
    """What became of one row."""

    place: str
    """File and line."""
    samples: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """int32 ids and bool loss mask, ``[tokens]`` each."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Reason and detail of each sample that the row did not give."""
    warnings: list[str] = field(default_factory=list)
    """What to tell of it, the same words for every row of its kind."""
    truncated: int = 0
    """How many of the samples were cut."""
    prompt: np.ndarray | None = None
    """int32 ids up to and with the generation prompt of the first assistant turn, where prompts were asked for."""


class Converter:
    """Makes samples of rows.

    Args:
        prompts: keep the prompts as well; a conversation without an answer is then nothing bad.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int], data: Data, prompts: bool) -> None:
        self.template = Template(tokenizer, end_ids)
        self.data, self.prompts = data, prompts

    def convert(self, place: str, row: Row) -> Converted:
        """All that a row gives. Never raises for what is in the row."""
        result = Converted(place)
        try:
            content = read_row(decode_line(row) if isinstance(row, bytes) else row, self.data.format)
            if isinstance(content, PlainText):
                self._add_text(result, content)
                return result
            result.warnings += self._ignored(content)
            if self.prompts:
                result.prompt = self._prompt(content)
        except Rejected as error:
            result.rejected.append((error.reason, error.detail))
            return result
        if result.prompt is not None and not content.assistant_turns:
            return result
        for part in self._parts(content):
            try:
                self._add(result, *self._sample(part))
            except Rejected as error:
                result.rejected.append((error.reason, error.detail))
        return result

    def _parts(self, conversation: Conversation) -> list[Conversation]:
        turns = conversation.assistant_turns
        if not self.data.split_turns or self.data.loss_on != "assistant" or not turns:
            return [conversation]
        return [replace(conversation, messages=conversation.messages[: turn + 1]) for turn in turns]

    def _sample(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        if self.data.loss_on == "all":
            ids, _ = self._encode(self.template.render(conversation))
            return ids, np.ones(len(ids), dtype=bool)
        turns = "last" if self.data.split_turns else self.data.loss_on
        text, spans = answer_spans(self.template, conversation, turns)
        return self.template.encode(text, spans)

    def _add_text(self, result: Converted, content: PlainText) -> None:
        _encodable(content.text)
        ids = self.template.encode_plain(content.text)
        try:
            self._add(result, ids, np.ones(len(ids), dtype=bool))
        except Rejected as error:
            result.rejected.append((error.reason, error.detail))

    def _add(self, result: Converted, ids: np.ndarray, mask: np.ndarray) -> None:
        length, limit = len(ids), self.data.max_tokens
        if length > limit and self.data.overlong == "skip":
            raise Rejected("longer than max_tokens", f"{length} tokens; data.max_tokens is {limit}")
        if not _teaches(mask):
            raise Rejected("no loss token", f"{length} tokens")
        if not _teaches(mask[:limit]):
            first = int(np.flatnonzero(mask)[0])
            raise Rejected(
                "no loss token within max_tokens", f"the first is token {first + 1}; data.max_tokens is {limit}"
            )
        result.samples.append((ids[:limit], mask[:limit]))
        result.truncated += length > limit

    def _prompt(self, conversation: Conversation) -> np.ndarray | None:
        turns = conversation.assistant_turns
        asked = conversation.messages[: turns[0]] if turns else conversation.messages
        if not any(message["role"] == "user" for message in asked):
            return None
        ids, _ = self._encode(self.template.render(replace(conversation, messages=asked), prompt=True))
        return ids if len(ids) <= self.data.max_tokens else None

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        _encodable(text)
        return self.template.encode(text)

    def _ignored(self, conversation: Conversation) -> list[str]:
        """What the conversation has and the template does not show."""
        source = self.template.source(conversation.tools)
        keys = {key for message in conversation.messages for key in message}
        found = [
            f"the chat template leaves out {key}, which the conversation has"
            for key in ("tool_calls", "reasoning_content")
            if key in keys and key not in source
        ]
        if conversation.tools and not re.search(r"\btools\b", source):
            found.append("the chat template leaves out tools, which the conversation has")
        if "strftime_now" in source:
            found.append("the chat template writes today's date into the conversation")
        return found


def _teaches(mask: np.ndarray) -> bool:
    return bool(_LEARNT.rows(mask)["last"].size)


def _encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("lone surrogate", f"U+{ord(text[error.start]):04X} is half a character") from error

"""The target's tokenizer and chat template: text from conversations, tokens from text.

Positions in text are carried to positions in tokens only where a boundary between two tokens lies exactly there.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from specbatch.corpus.conversation import Conversation, Rejected
from specbatch.errors import UserError

Span = tuple[int, int]
"""First position and the one after the last."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDER_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What Python raises inside a template that did not expect what it got; jinja2's own errors come on top."""


class Template:
    """A chat template together with its tokenizer.

    Args:
        tokenizer: of transformers.
        end_ids: ids after which the target stops, besides the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._variables = dict(tokenizer.special_tokens_map)
        self._specials = sorted(
            {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
            | set(tokenizer.all_special_tokens)
        )
        ends = {*end_ids, tokenizer.eos_token_id} - {None}
        self._ends = {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ends))}
        self._encoder: Any = None
        if tokenizer.is_fast:
            # A post-processor would take spaces out of the offsets; nothing else of it is used here.
            self._encoder = copy.deepcopy(tokenizer.backend_tokenizer)
            self._encoder.post_processor = None
            self._encoder.no_truncation()
            self._encoder.no_padding()

    # Text.

    def source(self, tools: list[dict[str, Any]] | None) -> str:
        """The template's text, which may be another one for conversations with tools.

        Raises:
            UserError: if the tokenizer has none.
        """
        try:
            return str(self.tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no chat template, which conversations need; "
                "put a chat_template.jinja into the target's directory, or use plain text"
            ) from error

    def has_markers(self, tools: list[dict[str, Any]] | None) -> bool:
        """Whether the template says itself what the assistant generates."""
        return bool(_MARKER.search(self.source(tools)))

    def render(self, conversation: Conversation, prompt: bool = False) -> str:
        """The conversation as text.

        Args:
            prompt: with what asks the assistant to go on, at the end.

        Raises:
            Rejected: in the template's own words, if it refuses the conversation.
        """
        return self._render(conversation, prompt, False)[0]

    def render_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The conversation as text, and what of it the template's markers enclose, in order.

        Raises:
            Rejected: as `render`.
        """
        text, spans = self._render(conversation, False, True)
        return text, sorted(span for span in spans if span[0] < span[1])

    def _render(self, conversation: Conversation, prompt: bool, marked: bool) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        def render(messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self._variables,
            )
            return texts[0], spans[0] if marked else []

        source = self.source(conversation.tools)
        try:
            try:
                return render(conversation.messages)
            except TypeError:
                if not any("tool_calls" in message for message in conversation.messages):
                    raise
                return render(_arguments_as_text(conversation.messages))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the chat template is wrong in line {error.lineno}: {error.message}"
            ) from error
        except (jinja2.TemplateError, *_RENDER_ERRORS) as error:
            raise Rejected(f"refused by the chat template: {error}") from error

    @cached_property
    def generation_prompt(self) -> str:
        """What asks the assistant to go on; empty where the template has nothing of the kind."""
        ask = Conversation([{"role": "user", "content": "question"}])
        try:
            text, with_prompt = self.render(ask), self.render(ask, prompt=True)
        except Rejected:
            return ""
        return with_prompt[len(text) :] if with_prompt.startswith(text) else ""

    # What ends a turn.

    def end_of_turn(self, after: str) -> int | None:
        """Length of the beginning of ``after``, what follows an answer, that the model itself writes to end it.

        None if there is no such token. What the template writes after an answer that is the last message can
        only be an end; elsewhere the token has to be one at which the target stops.
        """
        token, end = self.first_special(after)
        return end if token and token in self.ends else None

    @cached_property
    def ends(self) -> frozenset[str]:
        """Tokens that end a turn."""
        found = set(self._ends)
        talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            text = self.render(Conversation(talk))
        except Rejected:
            return frozenset(found)
        _, shown, after = text.rpartition("answer")
        token, _ = self.first_special(after if shown else "")
        return frozenset(found | ({token} if token else set()))

    def first_special(self, text: str) -> tuple[str, int]:
        """The first special token that is written out in a text, and where it ends; ("", 0) if none is."""
        places = [(text.find(token), -len(token), token) for token in self._specials if token in text]
        if not places:
            return "", 0
        place, _, token = min(places)
        return token, place + len(token)

    # Tokens.

    def encode(self, text: str, spans: Sequence[Span] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of rendered text.

        Args:
            spans: of characters, in order, none overlapping another.

        Returns:
            Ids, int32 ``[tokens]``, and which of them lie in the spans, bool ``[tokens]``.

        Raises:
            Rejected: if a span begins or ends inside a token.
        """
        positions = [position for span in spans for position in span]
        if self._encoder is not None:
            encoding = self._encoder.encode(text, add_special_tokens=False)
            ids, cuts = encoding.ids, _cuts(encoding.offsets, positions)
        else:
            ids = self._ids(text)
            cuts = [self._cut(text, ids, position) for position in positions]
        for position, cut in zip(positions, cuts, strict=True):
            if cut is None:
                around = text[max(0, position - 12) : position] + "|" + text[position : position + 12]
                raise Rejected("mask not provable", f"a token lies across the border of an answer: {around!r}")
        mask = np.zeros(len(ids), dtype=bool)
        for first, end in zip(cuts[::2], cuts[1::2], strict=True):
            mask[first:end] = True
        return np.asarray(ids, dtype=np.int32), mask

    def encode_plain(self, text: str) -> np.ndarray:
        """int32 ``[tokens]``: ids of text that no template has rendered, with the tokenizer's own special tokens."""
        return np.asarray(self.tokenizer(text)["input_ids"], dtype=np.int32)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _cut(self, text: str, ids: list[int], position: int) -> int | None:
        """For a tokenizer without offsets: the prefix's own tokens have to be the first tokens of the whole."""
        prefix = self._ids(text[:position])
        return len(prefix) if ids[: len(prefix)] == prefix else None


def _cuts(offsets: list[Span], positions: list[int]) -> list[int | None]:
    """How many tokens end at or before each position; None where a token lies across it."""
    if not positions:
        return []
    pairs = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = pairs[:, 0], np.maximum.accumulate(pairs[:, 1])
    cuts: list[int | None] = []
    for position in positions:
        cut = int(np.searchsorted(ends, position, side="right"))
        cuts.append(cut if cut == len(starts) or int(starts[cut:].min()) >= position else None)
    return cuts


def _arguments_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of tool calls as JSON text, which a few templates add to strings."""
    result = []
    for message in messages:
        calls = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for call in message.get("tool_calls", ())
        ]
        result.append({**message, "tool_calls": calls} if calls else message)
    return result

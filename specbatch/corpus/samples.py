"""Converts a row to samples, which are tokens and a loss mask, or gives the reasons why not.

The result depends only on the row, so any process can do the work in any order.
"""

from __future__ import annotations

import copy
import json
from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from specbatch.config import Data
from specbatch.corpus.conversation import Conversation, PlainText, Rejected
from specbatch.corpus.encoder import Asked, Encoded
from specbatch.corpus.files import Row
from specbatch.corpus.forms import MASKS, RowReader, Tokens
from specbatch.corpus.images import Image, ImageExpander
from specbatch.corpus.mask import answers, encodable
from specbatch.corpus.outlines import Outlines
from specbatch.corpus.preformatted import Preformatted
from specbatch.corpus.split import split
from specbatch.corpus.template import REFUSED, Template
from specbatch.corpus.tokenizer import tokenizer_size
from specbatch.errors import UserError

DATED = "the chat template writes today's date into the conversation: data.template_variables.date sets one"
Result = TypeVar("Result")
Steps = Generator[Asked, Encoded, Result]
"""Work that asks for texts to be encoded, one after the other; it is sent the tokens, or why there are none is raised
in it."""
MOST_GIVEN = 16
"""Most sets of conversations' own variables for which converters are cached."""
UNLEARNT = "no answer that is to be learnt"


@dataclass
class Converted:
    """The result of one row."""

    place: str
    """File and line."""
    samples: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """int32 ids and bool loss mask, ``[tokens]`` each."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Reason and detail of each sample that the row did not give."""
    warnings: list[str] = field(default_factory=list)
    """Warnings, with the same wording for every row of a kind."""
    truncated: int = 0
    """Number of samples that were truncated."""
    images: dict[int, list[Image]] = field(default_factory=dict)
    """The images of samples that have any, by their index in ``samples``."""
    prompt: np.ndarray | None = None
    """int32 ids up to and including the generation prompt of the first assistant turn, if prompts were requested."""


class Converter:
    """Makes samples of rows.

    Args:
        prompts: whether to keep the prompts as well; a conversation without an answer is then acceptable. Prompts with
            images are not kept.
        teaches: returns whether a draft learns anything from a sample with this loss mask.
        images: expands images; without it, conversations with images are rejected.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Sequence[int],
        data: Data,
        prompts: bool,
        teaches: Callable[[np.ndarray], bool],
        images: ImageExpander | None = None,
    ) -> None:
        self.template = Template(tokenizer, end_ids, data.template_variables)
        self.data, self.prompts, self.teaches, self.images = data, prompts, teaches, images
        self._reader, self._preformatted = RowReader(data), Preformatted(self.template)
        self._tokenizer_size = tokenizer_size(tokenizer)
        self._outlines = Outlines(self.template)
        self._given: dict[str, Converter] = {}
        """Converters for conversations with their own variables, by these variables."""

    def convert(self, place: str, row: Row) -> Converted:
        """Convert a row. Never raises because of the row's content."""
        return self.convert_all([(place, row)])[0]

    def convert_all(self, rows: Sequence[tuple[str, Row]]) -> list[Converted]:
        """Convert some rows, with all their texts encoded together: in turns with anything else, the tokenizer drives
        the other's code and data out of the processor's caches."""
        results = [Converted(place) for place, _ in rows]
        begun = [self._steps(result, row) for result, (_, row) in zip(results, rows, strict=True)]
        asking = [(steps, asked) for steps in begun if (asked := next(steps, None)) is not None]
        while asking:
            encoded = self.template.encoder.encode_all([asked for _, asked in asking])
            going = [(steps, _answered(steps, given)) for (steps, _), given in zip(asking, encoded, strict=True)]
            asking = [(steps, asked) for steps, asked in going if asked is not None]
        return results

    def _steps(self, result: Converted, row: Row) -> Steps[None]:
        """Convert a row."""
        try:
            content = self._reader.read(row, Path(result.place).expanduser().parent if self.images else None)
            if isinstance(content, PlainText):
                yield from self._add_text(result, content)
            elif isinstance(content, Tokens):
                self._add_tokens(result, content)
            else:
                yield from self.given(content.variables)._add_conversation(result, content)
        except Rejected as error:
            result.rejected.append((error.reason, error.detail))

    def given(self, variables: dict[str, Any]) -> Converter:
        """Return this converter with more variables for the chat template; some results are cached.

        Raises:
            Rejected: a variable can't be set.
        """
        if not variables:
            return self
        key = json.dumps(variables, sort_keys=True, default=str)
        found = self._given.get(key)
        if found is None:
            found = copy.copy(self)
            try:
                found.template = self.template.given(variables)
            except UserError as error:
                raise Rejected("a variable that the chat template cannot be given", str(error)) from error
            found._outlines = Outlines(found.template)
            if len(self._given) == MOST_GIVEN:
                self._given.clear()
            self._given[key] = found
        return found

    def _add_conversation(self, result: Converted, content: Conversation) -> Steps[None]:
        """Add the samples of a conversation, or its prompt if it has no answer.

        Raises:
            Rejected: there is nothing in it to learn.
        """
        if not content.assistant_turns:
            result.prompt = (yield from self._prompt(content)) if self.prompts else None
            if result.prompt is None:
                raise Rejected("no assistant turn")
            return
        if content.token_ids:
            result.prompt = (yield from self._prompt(content)) if self.prompts else None
            self._add_spoken(result, content)
            return
        content, text = self._begun(result, content)
        if self.prompts:
            result.prompt = yield from self._prompt(content)
        yield from self._add_samples(result, content, text)

    def _begun(self, result: Converted, conversation: Conversation) -> tuple[Conversation, str]:
        """Return the conversation and its text. If the template refuses it because it begins with turns of the
        assistant, these are removed.

        Raises:
            Rejected: the template refuses it for another reason.
        """
        try:
            return conversation, self._render(conversation)
        except Rejected as problem:
            messages = conversation.messages
            begin = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "assistant")), len(messages))
            kept = [m for m in messages[:begin] if m["role"] == "system"] + messages[begin:]
            if len(kept) == len(messages) or begin == len(messages):
                raise
            shorter = replace(conversation, messages=kept)
            try:
                text = self._render(shorter)
            except Rejected:
                raise problem from None
            result.warnings.append(
                "the chat template refuses conversations that begin with the assistant, that turn is dropped: "
                + problem.reason.removeprefix(f"{REFUSED}: ")
            )
            return shorter, text

    def _render(self, conversation: Conversation, prompt: bool = False) -> str:
        text = self.template.render(conversation, prompt)
        encodable(text)
        return text

    def _add_samples(self, result: Converted, conversation: Conversation, text: str) -> Steps[None]:
        """Add the sample of a conversation, or one for each of its turns.

        Args:
            text: the conversation as it is rendered.

        Raises:
            Rejected: nothing in it can be learnt.
        """
        learnt = self._learnt(conversation)
        result.warnings += self._said(conversation)
        if self.data.loss_on == "all":
            self._add(result, *(yield from self._everything(result, conversation, text)), conversation)
        elif not self.data.split_turns or self.data.loss_on == "last":
            found = self._outlines.answers(conversation, text, learnt)
            result.warnings += [said for lost in found.left_out.values() for said in lost]
            self._add(result, *(yield found.text, found.all), conversation)
        else:
            yield from self._split(result, conversation, text, learnt)

    def _learnt(self, conversation: Conversation) -> list[int]:
        """Return the messages of the assistant that are learnt.

        Raises:
            Rejected: there is none.
        """
        turns = conversation.assistant_turns
        learnt = [turn for turn in turns if conversation.learnt(turn)]
        if self.data.loss_on == "last":
            learnt = [turn for turn in learnt if turn == turns[-1]]
        if not learnt:
            raise Rejected(UNLEARNT, "weight 0 or train false")
        return learnt

    def _add_spoken(self, result: Converted, conversation: Conversation) -> None:
        """Add a sample for each turn of a conversation that has tokens next to texts."""
        learnt = self._learnt(conversation)
        result.warnings += self._said(conversation)
        for turn in learnt[-1:] if self.data.loss_on == "all" else learnt:
            try:
                ids, mask = self.turn(conversation, turn)
                part = replace(conversation, messages=conversation.messages[: turn + 1])
                self._add(result, ids, mask | (self.data.loss_on == "all"), part)
            except Rejected as error:
                result.rejected.append((error.reason, error.detail))

    def turn(self, conversation: Conversation, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and loss mask of one answer with the history before it. If it has its own tokens, they are used.

        Raises:
            Rejected: nothing about it can be proved.
        """
        part = replace(conversation, messages=conversation.messages[: turn + 1])
        written = part.messages[turn].get("token_ids")
        if written is None:
            found = answers(self.template, part, self._render(part), [turn])
            return self.template.encode(found.text, found.spans.get(turn, []))
        asked = self.template.encode(self._render(replace(part, messages=part.messages[:turn]), prompt=True))[0]
        ids = np.asarray(written, dtype=np.int64)
        self._refuse_unknown(ids)
        return np.concatenate([asked, ids.astype(np.int32)]), np.arange(len(asked) + len(ids)) >= len(asked)

    def _refuse_unknown(self, ids: np.ndarray) -> None:
        """Raise `Rejected` for ids that the tokenizer does not have."""
        beyond = np.flatnonzero((ids < 0) | (ids >= self._tokenizer_size))
        if beyond.size:
            raise Rejected(
                "an id that the tokenizer does not have",
                f"{int(ids[beyond[0]])} at token {int(beyond[0]) + 1}; it has 0 to {self._tokenizer_size - 1}",
            )

    def _split(self, result: Converted, conversation: Conversation, text: str, turns: list[int]) -> Steps[None]:
        """Add a sample for each turn, with the history that the template writes if the turn is the last."""
        shared: list[np.ndarray] = []
        """Tokens of the pieces of the text between the places up to which samples share it."""
        seams = [0]
        for turn in split(self.template, conversation, text, turns):
            if isinstance(turn, Rejected):
                result.rejected.append((turn.reason, turn.detail))
                continue
            result.warnings += turn.left_out
            if not turn.spans:
                continue
            if turn.seam > seams[-1]:
                shared.append((yield text[seams[-1] : turn.seam], ())[0])
                seams.append(turn.seam)
            known = bisect_right(seams, turn.seam) - 1
            at = seams[known]
            try:
                ids, mask = yield turn.text[at:], [(start - at, end - at) for start, end in turn.spans]
                end = int(np.flatnonzero(mask)[-1]) + 1 if turn.continued and mask.any() else len(ids)
                before = sum(map(len, shared[:known]))
                self._add(
                    result,
                    np.concatenate([*shared[:known], ids[:end]]),
                    np.concatenate([np.zeros(before, dtype=bool), mask[:end]]),
                    turn.conversation,
                )
            except Rejected as error:
                result.rejected.append((error.reason, error.detail))

    def _everything(self, result: Converted, conversation: Conversation, text: str) -> Steps[Encoded]:
        """Take all tokens as loss tokens, except those of assistant messages that are excluded."""
        turns = conversation.assistant_turns
        muted = [turn for turn in turns if not conversation.learnt(turn)]
        spans = []
        try:
            found = answers(self.template, conversation, text, turns)
            result.warnings += [said for lost in found.left_out.values() for said in lost]
            spans = [span for turn in muted for span in found.spans.get(turn, [])]
        except Rejected:
            if muted:
                raise
        ids, mask = yield text, spans
        return ids, ~mask

    def _add_text(self, result: Converted, content: PlainText) -> Steps[None]:
        encodable(content.text)
        found = self._preformatted.take_apart(content.text) if self.data.loss_on != "all" else None
        if found is None:
            ids = self.template.encoder.plain(content.text)
            self._add(result, ids, np.ones(len(ids), dtype=bool))
            return
        text, spans = found
        ids, mask = yield text, spans[-1:] if self.data.loss_on == "last" else spans
        if self.prompts and spans[0][0]:
            result.prompt = self._short((yield text[: spans[0][0]], ())[0])
        self._add(result, ids, mask)

    def _add_tokens(self, result: Converted, content: Tokens) -> None:
        """Add a tokenised row, unchanged after some checks."""
        ids, mask, names = content.ids, content.mask, "/".join(MASKS)
        self._refuse_unknown(ids)
        if self.data.loss_on == "all":
            mask = np.ones(len(ids), dtype=bool)
        if mask is None:
            raise Rejected("tokenised without a loss mask", f"none of {names}; data.loss_on: all needs none")
        starts = np.flatnonzero(np.diff(mask, prepend=False) & mask)
        if self.prompts and starts.size and starts[0]:
            result.prompt = self._short(ids[: starts[0]].astype(np.int32))
        if self.data.loss_on == "last" and starts.size:
            mask = mask & (np.arange(len(mask)) >= starts[-1])
        self._add(result, ids.astype(np.int32), mask)

    def _add(
        self, result: Converted, ids: np.ndarray, mask: np.ndarray, conversation: Conversation | None = None
    ) -> None:
        """Add a sample.

        Args:
            conversation: the part of the conversation that it consists of, for its images.
        """
        images: list[Image] = []
        if self.images and conversation and conversation.images:
            ids, mask, images = self.images.expand(ids, mask, conversation.images)
        length, limit = len(ids), self.data.max_tokens
        if length > limit and (self.data.overlong == "skip" or images):
            raise Rejected("longer than max_tokens", f"{length} tokens; data.max_tokens is {limit}")
        if not self.teaches(mask[:limit]):
            if length <= limit or not self.teaches(mask):
                raise Rejected("no loss token", f"{length} tokens")
            first = int(np.flatnonzero(mask)[0])
            raise Rejected(
                "no loss token within max_tokens", f"the first is token {first + 1}; data.max_tokens is {limit}"
            )
        if images:
            result.images[len(result.samples)] = images
        result.samples.append((ids[:limit], mask[:limit]))
        result.truncated += length > limit

    def _prompt(self, conversation: Conversation) -> Steps[np.ndarray | None]:
        turns = conversation.assistant_turns
        asked = conversation.messages[: turns[0]] if turns else conversation.messages
        if replace(conversation, messages=asked).images:
            return None
        if not any(message["role"] == "user" for message in asked):
            return None
        ids, _ = yield self._render(replace(conversation, messages=asked), prompt=True), ()
        return self._short(ids)

    def _short(self, prompt: np.ndarray) -> np.ndarray | None:
        return prompt if len(prompt) <= self.data.max_tokens else None

    def _said(self, conversation: Conversation) -> list[str]:
        """Warnings about the conversation besides parts of messages that are left out."""
        found = []
        if conversation.tools and not self.template.shows_tools:
            found.append("the chat template leaves out tools, which the conversation has")
        if self.template.writes_today:
            found.append(DATED)
        return found


def _answered(steps: Steps[None], encoded: Encoded | Rejected) -> Asked | None:
    """The next text that is to be encoded, after an answer; None if there is none."""
    try:
        return steps.throw(encoded) if isinstance(encoded, Rejected) else steps.send(encoded)
    except StopIteration:
        return None

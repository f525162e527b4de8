"""Finds how to write an answer so that `data` reproduces exactly the tokens of the target's prompt and answer.

An answer is written as plain text; or in parts, as the target's parsers find them; or with its tokens next to the text.
Each of these is rendered and tokenised like in `data`, and compared with the engine's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specbatch.corpus.conversation import Conversation, Rejected
from specbatch.corpus.mask import answers
from specbatch.corpus.samples import Converter
from specbatch.regenerate.parsers import Parsers

Message = dict[str, Any]
UNFINISHED = {"finish_reason": "length"}
"""Key of a message that a limit cut off, as in OpenAI's API; the corpus respects it."""
TEXT, PARSED, TOKENS = "text", "parsed", "token_ids"
"""The ways to write an answer."""


@dataclass(frozen=True)
class Fit:
    """Checks what `data` would read, for conversations with given template variables.

    Args:
        converter: the target's converter, as in `data`.
        parsers: the target's parsers.
    """

    converter: Converter
    parsers: Parsers

    def message(
        self, history: Conversation, asked: np.ndarray, written: Sequence[int], finished: bool
    ) -> tuple[Message, str]:
        """Return an answer as a message, and the way in which it is written.

        Args:
            history: the conversation before it.
            asked: token ids of the prompt, int32.
            written: token ids of the answer, including its end token if it has one.
            finished: whether it has one.

        Raises:
            Rejected: the answer is empty.
        """
        ids = list(written[:-1] if finished else written)
        # Special tokens inside the answer are kept: they are what the target said.
        text: str = self.converter.template.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if not text.strip():
            raise Rejected("an empty answer")
        end = {} if finished else UNFINISHED
        plain: Message = {"role": "assistant", "content": text, **end}
        if self._reads_back(history, plain, asked, written):
            return plain, TEXT
        parsed = [{**message, **end} for message in self.parsers.messages(text, history.tools)]
        for message in parsed:
            if self._reads_back(history, message, asked, written):
                return message, PARSED
        # A parser may treat an answer without a thought as nothing but a thought.
        whole = [message for message in parsed if message["content"].strip() or "tool_calls" in message]
        taken = next((message for message in (*whole, plain, *parsed) if self._is_taken(history, message)), plain)
        return {**taken, "token_ids": list(written)}, TOKENS

    def kept(self, conversation: Conversation, said: Mapping[int, Sequence[int]]) -> Conversation:
        """Return the whole conversation. Answers that the template renders differently now that others follow get their
        tokens next to the text.

        Args:
            said: token ids of each answer, by index of its message.
        """
        data, template = self.converter.data, self.converter.template
        if data.split_turns or data.loss_on != "assistant" or conversation.token_ids or len(said) < 2:
            return conversation
        try:
            found = answers(template, conversation, template.render(conversation), said)
            ids, mask = template.encode(found.text, found.all)
            if _equal(ids[mask], [token for turn in sorted(said) for token in said[turn]]):
                return conversation
            wrong = []
            for turn in said:
                ids, mask = template.encode(found.text, found.spans.get(turn, []))
                wrong += [] if _equal(ids[mask], said[turn]) else [turn]
        except Rejected:
            wrong = list(said)
        messages = [
            {**message, "token_ids": list(said[number])} if number in wrong else message
            for number, message in enumerate(conversation.messages)
        ]
        return replace(conversation, messages=messages)

    def _reads_back(self, history: Conversation, message: Message, asked: np.ndarray, written: Sequence[int]) -> bool:
        """Return whether `data` would produce exactly these tokens of prompt and answer."""
        whole = replace(history, messages=[*history.messages, message])
        try:
            ids, mask = self.converter.turn(whole, len(history.messages))
        except Rejected:
            return False
        begun = len(asked) + len(written)
        return (
            _equal(ids[:begun], [*asked, *written])
            and bool(mask[len(asked) : begun].all())
            and int(mask.sum()) == len(written)
        )

    def _is_taken(self, history: Conversation, message: Message) -> bool:
        """Return whether the chat template accepts a message in a conversation that continues."""
        more = [*history.messages, message, {"role": "user", "content": "question"}]
        try:
            self.converter.template.render(replace(history, messages=more), prompt=True)
        except Rejected:
            return False
        return True


def _equal(ids: np.ndarray, others: Sequence[int]) -> bool:
    return np.array_equal(ids, np.asarray(others, dtype=np.int64))

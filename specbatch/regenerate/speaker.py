"""The target as a partner in a conversation: renders the history, asks an engine, returns the answer's text."""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any

from specbatch.errors import UserError
from specbatch.regenerate.options import Regenerate
from specbatch.regenerate.rows import Row, Skip

if TYPE_CHECKING:
    from specbatch.inference.server import SGLangServer

CONTEXT_RESERVE = 8
"""Positions that SGLang keeps for itself at the end of its context."""
UNFINISHED = {"finish_reason": "length"}
"""What a message has beside its content when `max_new_tokens` cut it off; OpenAI's own words for it."""
REQUEST_TIMEOUT_S = 3600.0
"""An answer comes when it is whole, and many others are generated beside it."""


class Speaker:
    """Speaks as the target through any of its engines; safe to use from many threads.

    Raises:
        UserError: the target can't be read.
    """

    def __init__(self, options: Regenerate) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.options = options
        arguments = {"trust_remote_code": options.trust_remote_code}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(options.target, **arguments)
            config = AutoConfig.from_pretrained(options.target, **arguments).get_text_config()
        except (OSError, ValueError) as error:
            raise UserError(f"target: {options.target}: {error}") from error
        self.max_tokens = min(options.max_tokens or config.max_position_embeddings, config.max_position_embeddings)
        self.stop_ids = stop_ids(options.target, self.tokenizer, config)
        self.generated_tokens = 0

    def converse(self, row: Row, server: SGLangServer) -> list[dict[str, Any]]:
        """The row's conversation with the target's answers.

        Raises:
            Skip: this row can't be done; says why.
        """
        history: list[dict[str, Any]] = []
        for message in row.messages:
            if message["role"] == "assistant":
                message = self.answer(row, history, server)
            history.append(message)
            if UNFINISHED.items() <= message.items():
                return history
        if history[-1]["role"] != "assistant":
            history.append(self.answer(row, history, server))
        return history

    def answer(self, row: Row, history: list[dict[str, Any]], server: SGLangServer) -> dict[str, Any]:
        """What the target says next, as a message.

        Raises:
            Skip: nothing that can be used.
        """
        prompt = self.render(history)
        room = self.max_tokens - len(prompt) - CONTEXT_RESERVE
        if room < 1:
            raise Skip("longer than max_tokens")
        sampling = {
            "max_new_tokens": min(self.options.max_new_tokens, room),
            "stop_token_ids": self.stop_ids,
            "temperature": self.options.temperature,
            "top_p": self.options.top_p,
            "sampling_seed": answer_seed(self.options.seed, row.number, len(history)),
        }
        result = server.generate({"input_ids": prompt, "sampling_params": sampling}, REQUEST_TIMEOUT_S)
        ids = result["output_ids"]
        self.generated_tokens += len(ids)
        finished = bool(ids) and ids[-1] in self.stop_ids
        if not finished and self.options.unfinished == "skip":
            raise Skip("an answer without an end")
        # Special tokens inside the answer are kept: they are what the target said.
        text = self.tokenizer.decode(ids[:-1] if finished else ids, clean_up_tokenization_spaces=False)
        if not text.strip():
            raise Skip("an empty answer")
        return {"role": "assistant", "content": text} | ({} if finished else UNFINISHED)

    def render(self, history: list[dict[str, Any]]) -> list[int]:
        """Token ids of the history, up to where the target's answer begins.

        Raises:
            Skip: the chat template refuses it.
        """
        from jinja2 import TemplateError

        try:
            encoded = self.tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=True)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise Skip(f"refused by the chat template: {error}") from error
        return list(encoded["input_ids"])


def stop_ids(target: str, tokenizer: Any, config: Any) -> list[int]:
    """The ids that end an answer: chat models often name more of them for generation than their tokenizer does.

    Raises:
        UserError: none is named anywhere.
    """
    from transformers import GenerationConfig

    found = {*as_list(tokenizer.eos_token_id), *as_list(config.eos_token_id)}
    with contextlib.suppress(OSError):  # not every model has the file
        found.update(as_list(GenerationConfig.from_pretrained(target).eos_token_id))
    if not found:
        raise UserError(f"target: {target} names no token that ends an answer: set eos_token_id in its config.json")
    return sorted(found)


def as_list(ids: int | list[int] | None) -> list[int]:
    """Token ids that a model names: none, one or several."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def answer_seed(seed: int, row: int, message: int) -> int:
    """A seed of its own for each answer, whoever computes it and when; 31 bits."""
    digest = hashlib.blake2b(f"{seed}/{row}/{message}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1

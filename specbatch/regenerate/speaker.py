"""The target as a partner in a conversation: renders the history, asks an engine, returns the answer as a message."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from specbatch.corpus.conversation import Conversation, Rejected
from specbatch.corpus.template import Template
from specbatch.errors import UserError
from specbatch.regenerate.options import Regenerate
from specbatch.regenerate.rows import Row
from specbatch.rundir import read_json
from specbatch.target import locate

if TYPE_CHECKING:
    from specbatch.inference.server import SGLangServer

CONTEXT_RESERVE = 8
"""Positions that SGLang keeps for itself at the end of its context."""
UNFINISHED = {"finish_reason": "length"}
"""What a message has beside its content when a limit cut it off; OpenAI's own words for it, heeded by the corpus."""
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
        self.folder = locate(options.target)
        trusted = {"trust_remote_code": options.trust_remote_code, "local_files_only": True}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, **trusted)
            config = AutoConfig.from_pretrained(self.folder, **trusted).get_text_config()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"target: {options.target} cannot be read: {error}") from error
        positions = config.max_position_embeddings
        self.max_tokens = min(options.max_tokens or positions, positions)
        generation = read_json(self.folder / "generation_config.json") or {}
        named = (self.tokenizer.eos_token_id, config.eos_token_id, generation.get("eos_token_id"))
        self.stop_ids = sorted({token for entry in named for token in as_list(entry)})
        if not self.stop_ids:
            raise UserError(
                f"target: {options.target} names no token that ends an answer: set eos_token_id in its config.json"
            )
        self.template = Template(self.tokenizer, self.stop_ids)
        self.generated_tokens = 0

    def converse(self, row: Row, server: SGLangServer) -> list[dict[str, Any]]:
        """The row's conversation with the target's answers.

        Raises:
            Rejected: this row can't be done; says why.
        """
        history: list[dict[str, Any]] = []
        for message in row.conversation.messages:
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
            Rejected: nothing that can be used.
        """
        prompt, _ = self.template.encode(
            self.template.render(Conversation(history, row.conversation.tools), prompt=True)
        )
        room = self.max_tokens - len(prompt) - CONTEXT_RESERVE
        if room < 1:
            raise Rejected("longer than max_tokens")
        sampling = {
            "max_new_tokens": min(self.options.max_new_tokens, room),
            "stop_token_ids": self.stop_ids,
            "temperature": self.options.temperature,
            "top_p": self.options.top_p,
            "sampling_seed": answer_seed(self.options.seed, row.number, len(history)),
        }
        request = {"input_ids": prompt.tolist(), "sampling_params": sampling}
        ids = server.generate(request, REQUEST_TIMEOUT_S)["output_ids"]
        self.generated_tokens += len(ids)
        finished = bool(ids) and ids[-1] in self.stop_ids
        if not finished and self.options.unfinished == "skip":
            raise Rejected("an answer without an end")
        # Special tokens inside the answer are kept: they are what the target said.
        text = self.tokenizer.decode(ids[:-1] if finished else ids, clean_up_tokenization_spaces=False)
        if not text.strip():
            raise Rejected("an empty answer")
        return {"role": "assistant", "content": text} | ({} if finished else UNFINISHED)


def as_list(ids: int | list[int] | None) -> list[int]:
    """Token ids that a model names: none, one or several."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def answer_seed(seed: int, row: int, message: int) -> int:
    """A seed of its own for each answer, whoever computes it and when; 31 bits."""
    digest = hashlib.blake2b(f"{seed}/{row}/{message}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1

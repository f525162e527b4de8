"""Determines the form of a row by its first non-empty key, and converts it to the one form that all other code reads.

The forms are OpenAI `messages`, ShareGPT `conversations`, preference pairs (`chosen`), tokenised rows (`input_ids` and
a mask), a prompt and its answer, and plain text. ``data.columns`` maps other names of columns. Null, empty text and
empty lists count as missing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specbatch.config import Data
from specbatch.corpus.calls import as_calls, wrapped
from specbatch.corpus.conversation import Conversation, PlainText, Rejected, decode_line, read_row
from specbatch.corpus.files import Row, Unreadable
from specbatch.corpus.transform import load_transform
from specbatch.errors import UserError

PROMPTS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("answer", "completion", "response", "output")
SYSTEMS = ("system", "system_prompt")
MASKS = ("loss_mask", "labels", "assistant_masks", "assistant_mask", "completion_mask")
NAMES = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "chosen": ("chosen",),
    "input_ids": ("input_ids",),
    "loss_mask": MASKS,
    "prompt": PROMPTS,
    "answer": ANSWERS,
    "text": ("text",),
    "system": SYSTEMS,
    "tools": ("tools", "functions"),
}
"""The keys of ``data.columns``, and their default names."""
FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "chosen": ("chosen",),
    "tokens": ("input_ids",),
    "pairs": ("prompt", "answer"),
    "text": ("text",),
}
"""The forms in the order in which they are tried, and the keys that each requires."""
STRUCTURED = frozenset({"messages", "conversations", "input_ids", "loss_mask", "tools"})
"""Keys whose value may be JSON text."""
ABOUT = ("input", "context")
"""Keys of what an instruction is about: Alpaca's and Dolly's."""
VARIABLES = "chat_template_kwargs"
"""Key of a row's own template variables, as in trainers of the Hugging Face ecosystem."""
IGNORED_LABEL = -100
"""Label that trainers of the Hugging Face ecosystem write for a token that is not learnt."""


@dataclass(frozen=True)
class Tokens:
    """A tokenised row."""

    ids: np.ndarray
    """int64 ``[tokens]``."""
    mask: np.ndarray | None
    """bool ``[tokens]``; None if the row has none."""


class RowReader:
    """Reads rows according to ``data.format`` and ``data.columns``.

    Raises:
        UserError: ``data.columns`` has an unknown key, or ``data.transform`` can't be loaded.
    """

    def __init__(self, data: Data) -> None:
        unknown = sorted(set(data.columns) - set(NAMES))
        if unknown:
            raise UserError(f"data.columns: {unknown[0]}: there is no such key; its keys are {', '.join(NAMES)}")
        self.format, self._named = data.format, dict(data.columns)
        self._transform = load_transform(data.transform) if data.transform else None
        self._mapped = {form: any(key in data.columns for key in keys) for form, keys in FORMS.items()}

    @property
    def columns(self) -> frozenset[str]:
        """All top-level keys that may be read."""
        known = {name for key in NAMES for name in self._names(key)}
        return frozenset(known | {"history", "attention_mask", VARIABLES, *ABOUT})

    def read(self, row: Row, folder: Path | None = None) -> Conversation | PlainText | Tokens:
        """Return the content of a row.

        Args:
            row: JSON as bytes, or a decoded object.
            folder: directory that paths of images are relative to; without it, images are rejected.

        Raises:
            Rejected: it has none of the known forms.
        """
        row = self.decoded(row)
        if not isinstance(row, dict):
            return read_row(row, "auto")
        form = self._form(row)
        if form in ("messages", "conversations"):
            return self._conversation(row, self._messages(form, self._value(row, form)), folder)
        if form == "chosen":
            return self._conversation(row, self._chosen(row), folder)
        if form == "tokens":
            return self._tokens(row)
        if form == "pairs":
            return self._conversation(row, self._pair(row), folder)
        if form == "text":
            return read_row({"text": self._value(row, "text")}, "text")
        return self._nothing(row)

    def decoded(self, row: Row) -> Any:
        """Return a row as an object, after ``data.transform``.

        Raises:
            Rejected: it can't be read, or was left out.
        """
        if isinstance(row, Unreadable):
            raise Rejected("cannot be read", row.why)
        if isinstance(row, bytes):
            row = decode_line(row)
        if self._transform is not None and isinstance(row, dict):
            row = self._transformed(row)
        return row

    def _transformed(self, row: dict[str, Any]) -> Any:
        """Return the result of the user's function."""
        assert self._transform is not None
        try:
            made = self._transform(row)
        except Exception as error:  # whatever the user's code raises
            raise Rejected("data.transform failed", f"{type(error).__name__}: {error}") from error
        if made is None:
            raise Rejected("left out by data.transform")
        return made

    def _form(self, row: dict[str, Any]) -> str:
        """Return the first form whose keys are all non-empty; empty if there is none."""
        forms = list(FORMS) if self.format == "auto" else [self.format]
        for form in sorted(forms, key=lambda name: not self._mapped[name]):
            values = [self._value(row, key) for key in FORMS[form]]
            if all(map(_something, values)) and not (form in STRUCTURED and _nothing_as_text(values[0])):
                return form
        # A prompt alone suffices for answering and evaluation, if its key shows that it is one.
        alone = row.get(self._named.get("prompt", "prompt"))
        return "pairs" if "pairs" in forms and _something(alone) else ""

    def _nothing(self, row: dict[str, Any]) -> Conversation | PlainText:
        """Raise the reason why a row has none of the known forms."""
        keys = [self._named.get(key, key) for key in (FORMS[self.format] if self.format != "auto" else ())]
        if any(key in self._named for key in NAMES) or self.format in ("chosen", "tokens", "pairs"):
            keys = keys or [name for key, name in self._named.items()]
            there = ", ".join(map(str, row)) or "none"
            raise Rejected(f"without anything in {' and '.join(keys)}", f"its keys are {there}")
        return read_row(row, self.format)

    def _names(self, key: str) -> tuple[str, ...]:
        return (self._named[key],) if key in self._named else NAMES[key]

    def _value(self, row: dict[str, Any], key: str) -> Any:
        """Return the first non-empty value among a key's names; JSON text of an empty value counts as empty."""
        names = self._names(key)
        if key in STRUCTURED:
            names = tuple(name for name in names if not _nothing_as_text(row.get(name))) or names[:1]
        return _first(row, names)

    def _conversation(self, row: dict[str, Any], messages: list[Any], folder: Path | None) -> Conversation | PlainText:
        given = (self._value(row, "system"), self._value(row, "tools"), row.get(VARIABLES))
        system, tools, variables = (value if _something(value) else None for value in given)
        if isinstance(tools, str) and not tools.strip():
            tools = None
        if isinstance(variables, str):
            variables = _json(variables, VARIABLES)
        found = {"messages": messages, "system": system, "tools": wrapped(tools), VARIABLES: variables}
        return read_row(found, "messages", folder)

    def _messages(self, key: str, value: Any) -> list[Any]:
        """Return messages in the one form that `read_row` reads."""
        name = self._named.get(key, key)
        if isinstance(value, str):
            value = _json(value, name)
        if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
            # `datasets` keeps a sequence of objects as an object of sequences.
            lengths = {len(column) for column in value.values()}
            if len(lengths) == 1:
                value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
        if not isinstance(value, list):
            raise Rejected("malformed", f"{name} is of type {type(value).__name__}, not a list")
        if key in self._named and all(isinstance(text, str) for text in value):
            return [_message("assistant" if i % 2 else "user", text) for i, text in enumerate(value)]
        return as_calls([_cleared(message) for message in value])

    def _chosen(self, row: dict[str, Any]) -> list[Any]:
        """Return the preferred conversation of a preference pair."""
        chosen, asked = self._value(row, "chosen"), self._asked(row)
        if isinstance(chosen, str):
            chosen = _as_messages(chosen)
        if isinstance(chosen, str):
            text = [message["content"] for message in asked if isinstance(message.get("content"), str)]
            if len(text) == 1 and _DIALOGUE.match(text[0]) and text[0].endswith("Assistant:"):
                text, chosen = [], text[0] + chosen
            if not text or (len(text) == 1 and chosen.startswith(text[0]) and _DIALOGUE.search(chosen)):
                return _dialogue(chosen, self._named.get("chosen", "chosen"))
            return [*asked, _message("assistant", chosen)]
        if isinstance(chosen, dict):
            chosen = [chosen]
        found = self._messages("chosen", chosen)
        whole = any(isinstance(message, dict) and message.get("role") in ("user", "human") for message in found)
        return found if whole else [*asked, *found]

    def _pair(self, row: dict[str, Any]) -> list[Any]:
        """Return prompt and answer as messages, after the history."""
        asked, answer = self._asked(row), self._value(row, "answer")
        if not _something(answer):
            return asked
        if isinstance(answer, dict):
            answer = [answer]
        if isinstance(answer, list):
            return [*asked, *self._messages("answer", answer)]
        if not isinstance(answer, str):
            raise Rejected("malformed", f"the answer is of type {type(answer).__name__}")
        return [*asked, _message("assistant", answer)]

    def _asked(self, row: dict[str, Any]) -> list[Any]:
        """Return the messages of the prompt."""
        prompt = self._value(row, "prompt")
        if not _something(prompt):
            return []
        if isinstance(prompt, dict):
            prompt = [prompt]
        if isinstance(prompt, list):
            return self._messages("prompt", prompt)
        if not isinstance(prompt, str):
            raise Rejected("malformed", f"the prompt is of type {type(prompt).__name__}")
        # Alpaca's rows have an instruction and, in some rows, its input.
        if "prompt" not in self._named and row.get("instruction") == prompt:
            about = _first(row, tuple(name for name in ABOUT if name not in self._names("answer")))
            prompt = f"{prompt}\n\n{about}" if isinstance(about, str) and about else prompt
        said, history = [], row.get("history")
        history = _json(history, "history") if isinstance(history, str) and history else history
        history = history if _something(history) else []
        if not isinstance(history, list):
            raise Rejected("malformed", f"history is of type {type(history).__name__}, not a list")
        for turn in history:
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
                raise Rejected("malformed", "history is not a list of pairs of texts")
            said += [_message("user", turn[0]), _message("assistant", turn[1])]
        return [*said, _message("user", prompt)]

    def _tokens(self, row: dict[str, Any]) -> Tokens:
        """Return ids and mask of the row, without padding."""
        ids = _numbers(self._value(row, "input_ids"), self._names("input_ids")[0])
        names = [name for name in self._names("loss_mask") if _something(row.get(name))]
        mask = None
        if names:
            given = _numbers(row[names[0]], names[0])
            if len(given) != len(ids):
                raise Rejected("malformed", f"{len(ids)} ids, and {len(given)} values in {names[0]}")
            # Labels repeat the ids; a mask under any other name is boolean.
            labels = names[0] == "labels" or bool((given == IGNORED_LABEL).any())
            mask = given != IGNORED_LABEL if labels else given.astype(bool)
            wrong = (given != ids) & mask if labels else (given != 0) & (given != 1)
            if wrong.any():
                place = int(np.flatnonzero(wrong)[0])
                raise Rejected("malformed", f"{names[0]} has {int(given[place])} at token {place + 1}, id {ids[place]}")
        if _something(row.get("attention_mask")):
            there = _numbers(row["attention_mask"], "attention_mask") != 0
            if len(there) != len(ids):
                raise Rejected("malformed", f"{len(ids)} ids, and {len(there)} values in attention_mask")
            ids, mask = ids[there], None if mask is None else mask[there]
        return Tokens(ids, mask)


def _something(value: Any) -> bool:
    """Return whether a value is not null, not empty and not NaN."""
    if isinstance(value, float):
        return value == value
    return value is not None and not (isinstance(value, (str, list, dict)) and not value)


def _nothing_as_text(value: Any) -> bool:
    """Return whether a value is JSON text of null, of empty text, or of an empty list or object."""
    return isinstance(value, str) and value.strip() in ("", "null", "[]", "{}")


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first non-empty value; if there is none, the first that is not null."""
    values = [row[name] for name in names if row.get(name) is not None]
    return next(filter(_something, values), values[0] if values else None)


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _cleared(message: Any) -> Any:
    """Return a message with its non-empty role and content under these names."""
    if not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    if len(message) == 2 and role and content and isinstance(role, str) and isinstance(content, str):
        return message  # as most are
    rest = {k: v for k, v in message.items() if v is not None and k not in ("role", "from", "content", "value")}
    for key, names in (("role", ("role", "from")), ("content", ("content", "value"))):
        value = _first(message, names)
        if value is not None:
            rest[key] = value
    return rest


def _as_messages(text: str) -> Any:
    """Return the messages that a text holds as JSON; the text itself if it is an answer, which may be JSON as well."""
    if text.lstrip()[:1] != "[":
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    talk = all(isinstance(each, dict) and each.keys() & {"role", "from"} for each in found)
    return found if found and talk else text


def _json(text: str, name: str) -> Any:
    """Parse a value that is stored as JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Rejected("malformed", f"{name} is text, but not JSON: {why}") from error


def _numbers(value: Any, name: str) -> np.ndarray:
    """Convert a list of integers, which may be nested in a list, to int64 ``[tokens]``."""
    if isinstance(value, str):
        value = _json(value, name)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise Rejected("malformed", f"{name} is not a list of integers") from error
    if found.ndim != 1 or found.dtype.kind not in "biu" or found.dtype == np.uint64:
        raise Rejected("malformed", f"{name} is not a list of integers")
    return found.astype(np.int64)


_DIALOGUE = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def _dialogue(text: str, name: str) -> list[Any]:
    """Split a text into turns that begin on a new line with Human: or Assistant:, as in Anthropic's data."""
    pieces = _DIALOGUE.split(text)
    if len(pieces) < 5 or pieces[0].strip():
        raise Rejected("malformed", f"{name} is text, but the row has no prompt")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [_message(roles[who], said.strip()) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]

"""The target's chat template: from conversations to text, and what of that text are headers and ends of turns."""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from specbatch.corpus.conversation import IMAGE, IMAGES, Conversation, Rejected
from specbatch.corpus.encoder import Encoded, Encoder, Span
from specbatch.corpus.prefixes import ends_of_messages
from specbatch.errors import UserError

REFUSED = "refused by the chat template"
"""Reason of a row without a sample; the template's own message follows it."""
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDER_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Python's exceptions inside a template with unexpected input; jinja2 has its own in addition."""
_ATOM = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]|\n")
"""Matches units of a header besides the tokens that were added to the vocabulary: tags, and ends of lines."""
_QUOTED = re.compile("['\"]text['\"]")
"""Matches a list of parts that a template rendered verbatim."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "zqnqz",
        "description": "description",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "description"}}},
    },
}
"""A tool for templates that require one."""
_TAKEN = frozenset({"messages", "conversations", "chat_template", "add_generation_prompt"}) | {
    "continue_final_message",
    "return_assistant_tokens_mask",
}
"""Names of variables that rendering itself sets."""


class Template:
    """A chat template together with its tokenizer.

    Args:
        tokenizer: a tokenizer of transformers.
        end_ids: ids after which the target stops, besides the tokenizer's end token.
        variables: further variables of the template, from ``data.template_variables``.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int] = (), variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self._variables = _checked({**tokenizer.special_tokens_map, **(variables or {})})
        self._tools = self._variables.pop("tools", None)
        self.added = sorted(
            {t.content for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens), key=len
        )[::-1]
        """Tokens that were added to the vocabulary, special or not, the longest first."""
        others = [re.escape(token) for token in self.added if not _ATOM.fullmatch(token)]
        self._atom = re.compile("|".join([*others, _ATOM.pattern]))
        ends = {*end_ids, tokenizer.eos_token_id} - {None}
        self._ends = tuple(str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ends)))
        self.encoder = Encoder(tokenizer, self.added)

    def given(self, variables: Mapping[str, Any]) -> Template:
        """Return the same template with some more variables; everything else is shared."""
        other = copy.copy(self)
        for name in [name for name in vars(other) if isinstance(getattr(Template, name, None), cached_property)]:
            del other.__dict__[name]
        other._variables = _checked({**self._variables, **variables})
        other._tools = other._variables.pop("tools", self._tools)
        return other

    # Text.

    def source(self, tools: list[dict[str, Any]] | None) -> str:
        """Return the template's text, which may differ for conversations with tools.

        Raises:
            UserError: the tokenizer has none.
        """
        try:
            return str(self.tokenizer.get_chat_template(tools=tools or self._tools))
        except ValueError as error:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no chat template, which conversations need; "
                "put a chat_template.jinja into the target's directory, or use plain text"
            ) from error

    def has_markers(self, tools: list[dict[str, Any]] | None) -> bool:
        """Return whether the template itself marks what the assistant generates."""
        return bool(_MARKER.search(self.source(tools)))

    def render(self, conversation: Conversation, prompt: bool = False) -> str:
        """Return the conversation as text.

        Args:
            prompt: end with the generation prompt, which asks the assistant to continue.

        Raises:
            Rejected: the template refuses the conversation; with its own message.
        """
        return self._render(conversation, prompt, False, self._wants_parts)[0]

    def render_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the conversation as text, and the parts of it that the template's markers enclose, in order.

        Raises:
            Rejected: the same as `render`.
        """
        text, spans = self._render(conversation, False, True, self._wants_parts)
        return text, sorted(span for span in spans if span[0] < span[1])

    def _render(
        self, conversation: Conversation, prompt: bool, marked: bool, in_parts: Collection[str]
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[str, list[Span]]:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self._variables,
            )
            return texts[0], spans[0] if marked else []

        tools = conversation.tools or self._tools
        source = self.source(tools)
        messages = _in_parts(conversation.messages, in_parts)
        try:
            try:
                return render(messages, tools)
            except TypeError:
                if not any("tool_calls" in message for message in messages):
                    raise
                return render(_arguments_as_text(messages), tools)
            except (jinja2.TemplateError, *_RENDER_ERRORS) as error:
                if not any("function" in tool for tool in tools or ()):
                    raise
                try:
                    # Retry without OpenAI's wrapper of tools, as engines do.
                    return render(messages, [tool.get("function", tool) for tool in tools or ()])
                except (jinja2.TemplateError, *_RENDER_ERRORS):
                    raise error from None
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the chat template is wrong in line {error.lineno}: {error.message}"
            ) from error
        except (jinja2.TemplateError, *_RENDER_ERRORS) as error:
            raise Rejected(f"{REFUSED}: {error}") from error

    def ends_of_messages(self, conversation: Conversation, text: str) -> list[int] | None:
        """Return where the text ends that the template writes for the messages up to each one, by `ends_of_messages`.

        Args:
            text: the conversation as it is rendered.
        """
        tools = conversation.tools or self._tools
        variables = {"tools": tools, "documents": None, "add_generation_prompt": False, **self._variables}
        messages = _in_parts(conversation.messages, self._wants_parts)
        return ends_of_messages(self.source(tools), messages, variables, text)

    # Properties that are found by rendering a few words.

    def _probe(self, *talk: tuple[str, str], prompt: bool = False, in_parts: Collection[str] | None = None) -> str:
        """Return a few messages as text, with a tool if the template requires one; empty if it refuses them."""
        messages = [{"role": role, "content": content} for role, content in talk]
        for tools in (None, [_TOOL]):
            try:
                wanted = self._wants_parts if in_parts is None else in_parts
                return self._render(Conversation(messages, tools), prompt, False, wanted)[0]
            except Rejected:
                continue
        return ""

    @cached_property
    def _wants_parts(self) -> frozenset[str]:
        """Roles whose content the template shows as a list of parts and not as text."""

        def shows(in_parts: Collection[str], *roles: str) -> bool:
            words = [f"zq{i}qz" for i in range(len(roles))]
            text = self._probe(*zip(roles, words, strict=True), in_parts=in_parts)
            return not _QUOTED.search(text) and all(text.count(word) == 1 for word in words)

        choices: list[tuple[str, ...]] = [(), ("user", "assistant"), ("user",), ("assistant",)]
        talk = next((choice for choice in choices if shows(choice, "user", "assistant")), ())
        found = set(talk)
        for roles, role in ((("system", "user", "assistant"), "system"), (("user", "assistant", "tool"), "tool")):
            if talk and not shows(talk, *roles) and shows((*talk, role), *roles):
                found.add(role)
        return frozenset(found)

    @cached_property
    def generation_prompt(self) -> str:
        """Text that asks the assistant to continue; empty if the template has none."""
        text, with_prompt = (self._probe(("user", "question"), prompt=prompt) for prompt in (False, True))
        return with_prompt[len(text) :] if with_prompt.startswith(text) else ""

    @cached_property
    def prompt_beginnings(self) -> list[str]:
        """Beginnings of the generation prompt that end with a token that was added to the vocabulary, the longest
        first."""
        found, done, added = [], "", set(self.added)
        for atom in self._atoms(self.generation_prompt):
            done += atom
            if atom in added:
                found.append(done)
        return found[::-1]

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template renders the tools of a conversation."""
        try:
            return "zqnqz" in self.render(Conversation([{"role": "user", "content": "question"}], [_TOOL]))
        except Rejected:
            return True

    @cached_property
    def writes_today(self) -> bool:
        """Whether the rendered text depends on the date."""
        if "date" in self._variables:
            return False
        other = copy.copy(self)
        other._variables = {**self._variables, "strftime_now": lambda form: "zqdqz"}
        return any("zqdqz" in other._probe(("user", "question"), prompt=prompt) for prompt in (False, True))

    # What ends a turn.

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """Tokens that end a turn: those at which the target stops; if the template never writes one of them after an
        answer, the first added token that it writes there."""
        text = self._probe(("user", "question"), ("assistant", "answer"))
        _, shown, after = text.rpartition("answer")
        if not shown or _first(after, self._ends)[0]:
            return self._ends
        token, _ = _first(after, self.added)
        return (*self._ends, token) if token else self._ends

    def end_of_turn(self, after: str) -> int | None:
        """Return the length of the beginning of ``after``, the text following an answer, that the model writes itself.

        It ends with the first token that ends turns. None if there is none.
        """
        return _first(after, self.ends)[1] or None

    def parting(self, prompt: str, history: str) -> int:
        """Return the length of the common beginning of two texts that ends with a whole token, tag or line."""
        shared = 0
        for ours, theirs in zip(self._atoms(prompt), self._atoms(history), strict=False):
            if ours != theirs:
                break
            shared += len(ours)
        return shared

    def end_of_header(self, prompt: str, history: str) -> int:
        """Return where a header ends in a text that differs from the prompt only in plain text inside the header: a
        name in it, or settings that belong to the prompt; 0 if it differs otherwise."""
        ours, theirs = list(self._atoms(prompt)), list(self._atoms(history))
        ahead = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        if not ahead or ours[-1] not in self.added or ours[-1] not in theirs[ahead:]:
            return 0
        end = theirs.index(ours[-1], ahead)
        plain = not any(self._atom.fullmatch(atom) for atom in (*ours[ahead:-1], *theirs[ahead:end]))
        return len("".join(theirs[: end + 1])) if plain else 0

    def _atoms(self, text: str) -> Iterator[str]:
        done = 0
        for match in self._atom.finditer(text):
            if match.start() > done:
                yield text[done : match.start()]
            yield match[0]
            done = match.end()
        if done < len(text):
            yield text[done:]

    # Tokens.

    def encode(self, text: str, spans: Sequence[Span] = ()) -> Encoded:
        """Return the tokens of rendered text, as `Encoder.encode` does."""
        return self.encoder.encode(text, spans)


def _first(text: str, tokens: Iterable[str]) -> tuple[str, int]:
    """Return the first of some tokens that occurs in a text, the longest at its place, and where it ends; ("", 0) if
    none does."""
    places = [(text.find(token), -len(token), token) for token in tokens if token in text]
    if not places:
        return "", 0
    place, _, token = min(places)
    return token, place + len(token)


def _checked(variables: dict[str, Any]) -> dict[str, Any]:
    """Return variables as rendering passes them, with the date that they name.

    Raises:
        UserError: a variable can't be set.
    """
    if taken := _TAKEN.intersection(variables):
        raise UserError(f"data.template_variables.{min(taken)}: this name is reserved for the conversation itself")
    if "date" in variables:
        variables["strftime_now"] = _day(variables["date"]).strftime
    return variables


def _day(date: Any) -> datetime.date:
    """Return the date that ``data.template_variables.date`` names.

    Raises:
        UserError: it is not a date.
    """
    try:
        return datetime.date.fromisoformat(str(date))
    except ValueError as error:
        raise UserError(f"data.template_variables.date: {date!r} is not a date like 2026-01-31") from error


def _in_parts(messages: list[dict[str, Any]], roles: Collection[str]) -> list[dict[str, Any]]:
    """Return the messages with the content of some roles, and of messages with images, as a list of parts."""
    if any(IMAGES in message for message in messages):
        messages = [_with_images(message) if IMAGES in message else message for message in messages]
    if not roles:
        return messages
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if m["role"] in roles and m["content"] and isinstance(m["content"], str)
        else m
        for m in messages
    ]


def _with_images(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its images as parts of its content, if they are in it."""
    rest = {key: value for key, value in message.items() if key != IMAGES}
    if IMAGE not in message["content"]:
        return rest
    parts: list[dict[str, str]] = []
    for number, text in enumerate(message["content"].split(IMAGE)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return {**rest, "content": parts}


def _arguments_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the arguments of tool calls as JSON text, which a few templates add to strings."""
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

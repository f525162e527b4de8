"""Parses reasoning and tool calls in a target's answers, as the serving engine does."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from specbatch.corpus.conversation import REASONING, Rejected, read_row
from specbatch.corpus.template import Template

logger = logging.getLogger(__name__)


class Parsers:
    """SGLang's parsers for one target: those that ``inference.sglang`` names, else those that SGLang chooses for its
    template. Without SGLang there are none.

    Args:
        given: ``inference.sglang``.
    """

    def __init__(self, template: Template, given: dict[str, Any]) -> None:
        self._template, self._given = template, given

    def messages(self, text: str, tools: list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
        """Yield messages as which an answer may be written, besides plain text; the likeliest first."""
        reasoning_parser, call_parser = self._names
        parts = [("", text)]
        if reasoning_parser:
            # The text does not show whether the prompt has already opened the thought.
            parts += [found for force in (None, True) if (found := self._reasoning(reasoning_parser, text, force))]
        seen: list[dict[str, Any]] = []
        for reasoning, content in reversed(parts):
            rest, calls = self._calls(call_parser, content, tools) if call_parser and tools else (content, [])
            for key in REASONING if reasoning else REASONING[:1]:
                message: dict[str, Any] = {"role": "assistant", "content": rest}
                message |= {key: reasoning} if reasoning else {}
                message |= {"tool_calls": calls} if calls else {}
                if (reasoning or calls) and message not in seen:
                    seen.append(message)
                    yield message

    @cached_property
    def _names(self) -> tuple[str, str]:
        """Return the names of the parsers for reasoning and tool calls; empty if there is none."""
        try:
            from sglang.srt.parser import template_detection
        except ImportError as error:
            logger.warning("answers are not parsed: SGLang is missing why=%s", error)
            return "", ""
        source, tokenizer = self._template.source(None), self._template.tokenizer
        force, toggle = template_detection.detect_reasoning_pattern(source)
        found = []
        for key, detect in (
            ("reasoning_parser", template_detection.detect_reasoning_parser),
            ("tool_call_parser", template_detection.detect_tool_call_parser),
        ):
            given = self._given.get(key)
            found.append(given if given and given != "auto" else detect(source, tokenizer, toggle, force) or "")
        logger.info("answers are parsed as SGLang does reasoning=%s calls=%s", *(name or "none" for name in found))
        return found[0], found[1]

    def _reasoning(self, name: str, text: str, force: bool | None) -> tuple[str, str] | None:
        from sglang.srt.parser.reasoning_parser import ReasoningParser

        try:
            parser = ReasoningParser(model_type=name, stream_reasoning=False, force_reasoning=force)
            reasoning, content = parser.parse_non_stream(text)
        except Exception as error:  # a parser may fail in any way on a model's output
            logger.debug("not parsed parser=%s why=%s", name, error)
            return None
        return (reasoning, content or "") if reasoning else None

    def _calls(self, name: str, text: str, tools: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
        from sglang.srt.entrypoints.openai.protocol import Tool
        from sglang.srt.function_call.function_call_parser import FunctionCallParser

        try:
            known = [Tool.model_validate(tool) for tool in tools]
            rest, items = FunctionCallParser(known, name).parse_non_stream(text)
            calls = [
                {"type": "function", "function": {"name": item.name, "arguments": json.loads(item.parameters or "{}")}}
                for item in items
            ]
            read_row({"messages": [{"role": "assistant", "content": rest, "tool_calls": calls}]}, "messages")
        except (Exception, Rejected) as error:  # as above
            logger.debug("not parsed parser=%s why=%s", name, error)
            return text, []
        return rest, calls

"""Prompts from benchmarks and conversations, rendered by the target's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

from specbatch.config import Config
from specbatch.corpus.conversation import Conversation, Rejected
from specbatch.corpus.forms import RowReader
from specbatch.corpus.sources import find_sources
from specbatch.corpus.template import Template
from specbatch.corpus.tokenizer import load_tokenizer
from specbatch.errors import UserError
from specbatch.evaluation.engines import Questions, Subject
from specbatch.evaluation.sets import read_sets
from specbatch.regenerate.rows import questions, read_rows
from specbatch.target import TargetShape


def benchmark_prompts(config: Config, shape: TargetShape) -> Questions:
    """The prompts of ``evaluate.sets``.

    Raises:
        UserError: a file has another form, or the template refuses a question.
    """
    found = read_sets(config.evaluate.sets)
    if not found:
        return {}
    template = _template(config, shape)
    return {
        name: [
            _encode(template, Conversation([{"role": "user", "content": text}]), f"evaluate.sets.{name}")
            for text in texts
        ]
        for name, texts in found.items()
    }


def conversation_prompts(config: Config, shape: TargetShape, files: Sequence[str]) -> list[list[int]]:
    """The messages before the first answer of each conversation in files of any form that ``data.heldout`` accepts.

    Raises:
        UserError: a file can't be read, or one of its rows is not a conversation.
    """
    reader, template, found = RowReader(config.data), _template(config, shape), []
    for row in read_rows(find_sources(files, reader.columns)):
        try:
            conversation, _ = questions(reader, row.content)
        except Rejected as problem:
            raise UserError(f"{row.place}: {problem.reason} {problem.detail}".rstrip()) from problem
        asked = conversation.messages
        first = next((i for i, message in enumerate(asked) if message["role"] == "assistant"), len(asked))
        found.append(_encode(template, Conversation(asked[:first], conversation.tools), row.place))
    if not found:
        raise UserError(f"{', '.join(files)}: no rows")
    return found


def spread(prompts: Questions, subject: Subject) -> tuple[Questions, int]:
    """Choose ``evaluate.prompts`` prompts of each set, evenly spaced; returns also how many are too long to use.

    Raises:
        UserError: no prompt of a set leaves room for an answer.
    """
    chosen, left_out = {}, 0
    for name, every in prompts.items():
        usable = [prompt for prompt in every if 0 < len(prompt) <= subject.room()]
        if not usable:
            raise UserError(
                f"none of the {len(every)} prompts of {name} leaves room for evaluate.max_new_tokens "
                f"{subject.settings.max_new_tokens} in the target's context of {subject.shape.max_positions} tokens"
            )
        count = min(subject.settings.prompts, len(usable))
        chosen[name] = [usable[i * len(usable) // count] for i in range(count)]
        left_out += len(every) - len(usable)
    return chosen, left_out


def _template(config: Config, shape: TargetShape) -> Template:
    return Template(load_tokenizer(config), shape.eos, config.data.template_variables)


def _encode(template: Template, conversation: Conversation, where: str) -> list[int]:
    try:
        return list(map(int, template.encode(template.render(conversation, prompt=True))[0]))
    except Rejected as problem:
        raise UserError(f"{where}: {problem.reason} {problem.detail}".rstrip()) from problem

"""Reading and writing a configuration: a YAML file, and fields of it overridden on the command line.

Both are turned into the same text arguments and parsed by jsonargparse, so that a value means the same in both.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

import yaml

from specbatch.config.document import Document, read_document, text_of, unknown
from specbatch.config.paths import anchored
from specbatch.config.rules import Bytes, broken, describe, split
from specbatch.config.sections import Config
from specbatch.config.write import to_yaml
from specbatch.errors import UserError

if TYPE_CHECKING:
    import jsonargparse

COMMAND_LINE = "command line"


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Paths in the file are relative to it, those among the overrides to the current directory, and so is ``run.dir``.

    Args:
        path: a YAML file.
        overrides: ``--training.learning_rate 1e-3``, ``--training.learning_rate=1e-3``, ...

    Raises:
        UserError: for a file that can't be read, an unknown key, or a value that a field can't have: with file and
            line, and what would do. What depends on two fields or on other files is not looked at.
    """
    hints = field_hints()
    document = read_document(path, hints)
    given = dict(_overrides(overrides, hints))
    texts = {**document.texts, **{key: text for key, text in given.items() if key in hints}}

    def where(key: str) -> str:
        return COMMAND_LINE if key in given else document.where(key)

    missing = [key for key in _required() if key not in texts]
    if missing:
        raise UserError(f"{path}: {missing[0]}: is missing: {_texts(missing[0].split('.')[0])[missing[0]]}")
    values = _parse({**document.texts, **given}, where)
    for key, mapping in document.mappings.items():
        values[key] = {**mapping, **values[key]}
    for key, value in values.items():
        if broken(hints[key], value):
            raise UserError(f"{where(key)}: {key}: {texts.get(key, value)} is not {describe(hints[key])}")
    _anchor(values, document, given)
    sections = {}
    for name, section in get_type_hints(Config).items():
        own = {entry.name: values[f"{name}.{entry.name}"] for entry in dataclasses.fields(section)}
        sections[name] = section(**own)
    return Config(**sections)


def dump_config(config: Config, explain: bool = False) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one.

    Args:
        explain: put each field's documentation above it.
    """
    parts = []
    for name, section in get_type_hints(Config).items():
        help_texts = _texts(name)
        parts.append(f"{name}:" if dataclasses.fields(section) else f"{name}: {{}}")
        for entry in dataclasses.fields(section):
            key = f"{name}.{entry.name}"
            if explain:
                parts += [f"  # {line}" for line in textwrap.wrap(help_texts[key], 110)]
            value = getattr(getattr(config, name), entry.name)
            parts += [f"  {line}" for line in to_yaml({entry.name: value}).splitlines()]
    return "\n".join(parts) + "\n"


@cache
def field_hints() -> dict[str, Any]:
    """Type, rules included, of each field by its dotted key, in the order of the sections."""
    hints = {}
    for name, section in get_type_hints(Config).items():
        own = get_type_hints(section, include_extras=True)
        hints.update({f"{name}.{entry.name}": own[entry.name] for entry in dataclasses.fields(section)})
    return hints


def config_parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser with an option for each field, grouped by sections."""
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import register_type

    register_type(Bytes, serializer=str, deserializer=Bytes.parse, fail_already_registered=False)
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False, print_config=None
    )
    hints = field_hints()
    for name, section in get_type_hints(Config).items():
        group = parser.add_argument_group(name, (section.__doc__ or "").strip())
        for entry in dataclasses.fields(section):
            key = f"{name}.{entry.name}"
            default = entry.default
            if entry.default_factory is not dataclasses.MISSING:
                default = entry.default_factory()
            required = default is dataclasses.MISSING
            group.add_argument(
                f"--{key}",
                type=_bare(section, entry.name),
                help=f"{_texts(name)[key]} {describe(hints[key]).capitalize()}.",
                **({"required": True} if required else {"default": default}),
            )
    return parser


@cache
def _texts(name: str) -> dict[str, str]:
    """The documentation of each field of a section, by its dotted key, in one line."""
    import docstring_parser

    section = get_type_hints(Config)[name]
    found = docstring_parser.parse_from_object(section)
    return {f"{name}.{entry.arg_name}": " ".join((entry.description or "").split()) for entry in found.params}


def _overrides(tokens: Sequence[str], hints: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted keys and texts of options of the command line."""
    waiting = list(tokens)
    while waiting:
        token = waiting.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise UserError(f"{COMMAND_LINE}: {token}: is no option; a field is set as --training.ranks 2")
        into_mapping = any(key.startswith(f"{known}.") for known in _mappings(hints))
        if key not in hints and not into_mapping:
            raise UserError(f"{COMMAND_LINE}: {unknown(key, hints)}")
        if not equals and waiting and not waiting[0].startswith("--"):
            text = waiting.pop(0)
        elif not equals and hints.get(key) is bool:
            text = "true"
        elif not equals:
            raise UserError(f"{COMMAND_LINE}: {key}: has no value; it must be {describe(hints.get(key, str))}")
        try:
            yield key, text if into_mapping else text_of(text, hints[key])
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{COMMAND_LINE}: {key}: {text} is not {describe(hints[key])}") from error


def _mappings(hints: dict[str, Any]) -> list[str]:
    return [key for key, hint in hints.items() if get_origin(split(hint)[0]) is dict]


def _parse(texts: dict[str, str], where: Callable[[str], str]) -> dict[str, Any]:
    """The value of every field, given the texts of some."""
    hints = field_hints()
    try:
        parsed = config_parser("specbatch", "").parse_args([f"--{key}={text}" for key, text in texts.items()])
    except argparse.ArgumentError as error:
        found = re.search(r'Parser key "([^"]+)"', str(error))
        key = found[1] if found and found[1] in hints else ""
        if not key:
            raise UserError(f"{COMMAND_LINE}: {' '.join(str(error).split())}") from error
        raise UserError(f"{where(key)}: {key}: {texts[key]} is not {describe(hints[key])}") from error
    return {key: parsed[key] for key in hints}


def _anchor(values: dict[str, Any], document: Document, given: dict[str, str]) -> None:
    """Make paths absolute, in place."""
    for key in ("target.path", "data.train", "data.heldout", "data.cache_dir"):
        base, hub = Path() if key in given else document.path.parent, key != "data.cache_dir"
        if isinstance(values[key], list):
            values[key] = [anchored(text, base, hub) for text in values[key]]
        elif values[key] is not None:
            values[key] = anchored(values[key], base, hub)
    values["run.dir"] = anchored(values["run.dir"], Path())
    values["run.name"] = values["run.name"] or Path(values["run.dir"]).name


def _bare(section: type, name: str) -> Any:
    return get_type_hints(section)[name]


def _required() -> list[str]:
    return [
        f"{name}.{entry.name}"
        for name, section in get_type_hints(Config).items()
        for entry in dataclasses.fields(section)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]

"""Options of the command line, made from the fields of dataclasses: type, rules, default, and the help text."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

import yaml

from specbatch.config.document import text_of, unknown
from specbatch.config.rules import Bytes, Interval, broken, describe, has_rules
from specbatch.errors import UserError

if TYPE_CHECKING:
    import jsonargparse

COMMAND_LINE = "command line"
Made = TypeVar("Made")


@dataclass(frozen=True)
class Option:
    """A field, as an option."""

    hint: Any
    """Its type with its rules."""
    bare: Any
    """Its type."""
    default: Any
    """``MISSING`` where there is none."""
    text: str
    """Its documentation, in one line."""

    @property
    def mapping(self) -> bool:
        """Whether ``--option.key value`` sets a key of it."""
        return get_origin(self.bare) is dict


Options = dict[str, Option]
"""By name; the fields of a section are named ``section.field``."""


def options_of(kind: type, prefix: str = "") -> Options:
    """The options for the fields of a dataclass; a field that is a dataclass has ``field.own`` for each of its own."""
    import docstring_parser

    hints, bare = get_type_hints(kind, include_extras=True), get_type_hints(kind)
    texts = {entry.arg_name: entry.description or "" for entry in docstring_parser.parse_from_object(kind).params}
    found = {}
    for entry in dataclasses.fields(kind):
        if dataclasses.is_dataclass(bare[entry.name]):
            found.update(options_of(bare[entry.name], f"{prefix}{entry.name}."))
            continue
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        text = " ".join(texts.get(entry.name, "").split())
        found[f"{prefix}{entry.name}"] = Option(hints[entry.name], bare[entry.name], default, text)
    return found


def made_of(kind: type[Made], values: Mapping[str, Any], prefix: str = "") -> Made:
    """A dataclass from the values of its `options_of`."""
    bare = get_type_hints(kind)
    return kind(
        **{
            entry.name: made_of(bare[entry.name], values, f"{prefix}{entry.name}.")
            if dataclasses.is_dataclass(bare[entry.name])
            else values[f"{prefix}{entry.name}"]
            for entry in dataclasses.fields(kind)  # type: ignore[arg-type]
        }
    )


def parser(prog: str, description: str, groups: Mapping[str, tuple[str, Options]]) -> jsonargparse.ArgumentParser:
    """A parser of options.

    Args:
        groups: description and options of each group, by its title.
    """
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import register_type

    for kind in (Bytes, Interval):
        register_type(kind, serializer=str, deserializer=kind.parse, fail_already_registered=False)
    made = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False, print_config=None
    )
    for title, (about, options) in groups.items():
        group = made.add_argument_group(title, about)
        for name, option in options.items():
            ruled = describe(option.hint) if has_rules(option.hint) else ""
            rule = f" {ruled[:1].upper()}{ruled[1:]}." if ruled else ""
            action = group.add_argument(
                f"--{name}",
                type=option.bare,
                help=f"{option.text}{rule}".replace("%", "%%"),
                **({"required": True} if option.default is MISSING else {"default": option.default}),
            )
            # jsonargparse's way to add to a list: which of a list's paths are relative to the file would be lost.
            action.option_strings = [f"--{name}"]
    return made


def command_line(tokens: Sequence[str], options: Options) -> Iterator[tuple[str, str]]:
    """Names and texts of the options on a command line, in its order.

    Raises:
        UserError: for an unknown one, with the nearest, and for one without a value.
    """
    waiting = list(tokens)
    while waiting:
        token = waiting.pop(0)
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not name:
            example = next(iter(options))
            raise UserError(f"{COMMAND_LINE}: {token}: is no option; options look like --{example} VALUE")
        inside = any(option.mapping and name.startswith(f"{known}.") for known, option in options.items())
        if name not in options and not inside:
            raise UserError(f"{COMMAND_LINE}: {unknown(name, {key: option.hint for key, option in options.items()})}")
        hint = options[name].hint if name in options else str
        if not equals and waiting and not waiting[0].startswith("--"):
            text = waiting.pop(0)
        elif not equals and hint is bool:
            text = "true"
        elif not equals:
            raise UserError(f"{COMMAND_LINE}: {name}: has no value; it must be {describe(hint)}")
        try:
            yield name, text if inside else text_of(text, hint)
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{COMMAND_LINE}: {name}: {text} is not {describe(hint)}") from error


def values_of(texts: Mapping[str, str], options: Options, where: Callable[[str], str]) -> dict[str, Any]:
    """The value of every option, from the texts of some.

    Args:
        where: says where an option's text stands, for messages.

    Raises:
        UserError: for a text that is no value of its option, or an option that is missing.
    """
    for name, option in options.items():
        if option.default is MISSING and name not in texts:
            raise UserError(f"{where(name)}: {name}: is missing: {option.text}")
    arguments = [f"--{name}={text}" for name, text in texts.items()]
    try:
        parsed = parser("specbatch", "", {"": ("", options)}).parse_args(arguments)
    except argparse.ArgumentError as error:
        found = re.search(r'Parser key "([^"]+)"', str(error))
        name = found[1] if found else ""
        if name not in options:
            raise UserError(f"{COMMAND_LINE}: {' '.join(str(error).split())}") from error
        raise UserError(f"{where(name)}: {name}: {texts[name]} is not {describe(options[name].hint)}") from error
    values = {name: parsed[name] for name in options}
    for name, value in values.items():
        if broken(options[name].hint, value):
            raise UserError(f"{where(name)}: {name}: {texts.get(name, value)} is not {describe(options[name].hint)}")
    return values


def parse_options(kind: type[Made], tokens: Sequence[str]) -> Made:
    """A dataclass from a command line. Raises as `command_line` and `values_of`."""
    options = options_of(kind)
    return made_of(kind, values_of(dict(command_line(tokens, options)), options, lambda name: COMMAND_LINE))

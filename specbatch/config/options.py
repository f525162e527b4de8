"""Makes command-line options from the fields of dataclasses: type, rules, default, and help text."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_origin, get_type_hints

import yaml

from specbatch.config.document import text_of, unknown
from specbatch.config.rules import Bytes, Interval, broken, describe, optional, split
from specbatch.errors import UserError

if TYPE_CHECKING:
    import jsonargparse

COMMAND_LINE = "command line"
Made = TypeVar("Made")


@dataclass(frozen=True)
class Option:
    """An option of the command line, made from a field."""

    hint: Any
    """Type of the field with its rules."""
    bare: Any
    """Type of the field."""
    default: Any
    """Default of the field; ``MISSING`` if it is required."""
    text: str
    """Docstring of the field, in one line."""

    @property
    def mapping(self) -> bool:
        """Whether ``--option.key value`` sets a key of it."""
        return get_origin(self.bare) is dict

    @property
    def values(self) -> str:
        """Description of valid values; empty for texts, switches and choices, for which the type says nothing more."""
        kind, nullable = optional(split(self.hint)[0])
        plain = get_origin(split(kind)[0]) is Literal or split(kind)[0] in (str, bool)
        return "" if plain else describe(kind if nullable else self.hint)

    @property
    def default_text(self) -> str:
        """Its default as a person writes it, or ``required``."""
        default = self.default
        if default is MISSING:
            return "required"
        if default is None:
            return "not set"
        if isinstance(default, bool):
            return str(default).lower()
        if default in ("", [], {}):
            return "empty"
        if isinstance(default, tuple | list):
            return ", ".join(map(str, default))
        return f"{default:g}" if isinstance(default, float) else str(default)

    @property
    def help(self) -> str:
        """What it does, which values it takes and its default, in sentences."""
        values = f" {self.values[:1].upper()}{self.values[1:]}." if self.values else ""
        default = "Required." if self.default is MISSING else f"Default: {self.default_text}."
        return f"{self.text}{values} {default}".strip()


Options = dict[str, Option]
"""Options by name; fields of a section are named ``section.field``."""


def options_of(kind: type, prefix: str = "") -> Options:
    """Return the options for the fields of a dataclass. A field that is itself a dataclass gives ``field.name`` for
    each of its fields."""
    import docstring_parser

    hints, bare = get_type_hints(kind, include_extras=True), get_type_hints(kind)
    texts = {
        entry.arg_name: entry.description or ""
        for base in reversed(kind.__mro__[:-1])
        for entry in docstring_parser.parse_from_object(base).params
        if entry.description
    }
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
    """Construct a dataclass from the values of its `options_of`."""
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
    """Return a parser for options.

    Args:
        groups: description and options of each group, by its title.
    """
    from jsonargparse import ArgumentParser, DefaultHelpFormatter
    from jsonargparse.typing import register_type

    class Help(DefaultHelpFormatter):
        """Shows each option's own text, which names type and default in the user's words."""

        def _get_help_string(self, action: argparse.Action) -> str:
            return action.help or ""

    for kind in (Bytes, Interval):
        register_type(kind, serializer=str, deserializer=kind.parse, fail_already_registered=False)
    made = ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=Help,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    for title, (about, options) in groups.items():
        group = made.add_argument_group(title, about)
        for name, option in options.items():
            action = group.add_argument(
                f"--{name}",
                type=option.bare,
                help=option.help.replace("%", "%%"),
                **({"required": True} if option.default is MISSING else {"default": option.default}),
            )
            # jsonargparse could append to lists; then it would be unknown which of the paths are relative to the file.
            action.option_strings = [f"--{name}"]
    return made


def command_line(tokens: Sequence[str], options: Options) -> Iterator[tuple[str, str]]:
    """Yield names and texts of the options on a command line, in order.

    Raises:
        UserError: an option is unknown (with the nearest known one), or has no value.
    """
    waiting = list(tokens)
    while waiting:
        token = waiting.pop(0)
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not name:
            example = next(iter(options))
            raise UserError(f"{COMMAND_LINE}: {token}: is not an option; options look like --{example} VALUE")
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
    """Return the value of every option, from the texts of some.

    Args:
        where: returns the place of an option's text, for messages.

    Raises:
        UserError: a text is not a valid value, or a required option is missing.
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
    """Construct a dataclass from a command line. Raises the same as `command_line` and `values_of`."""
    options = options_of(kind)
    return made_of(kind, values_of(dict(command_line(tokens, options)), options, lambda name: COMMAND_LINE))

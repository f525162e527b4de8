"""Reading and writing a configuration: a YAML file, and fields of it overridden on the command line.

Both are turned into the same text arguments and parsed by jsonargparse, so that a value means the same in both.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from specbatch.config.document import Document, read_document
from specbatch.config.options import COMMAND_LINE, Options, command_line, made_of, options_of, parser, values_of
from specbatch.config.paths import anchored
from specbatch.config.sections import Config
from specbatch.config.write import to_yaml

if TYPE_CHECKING:
    import jsonargparse


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
    options = config_options()
    document = read_document(path, {name: option.hint for name, option in options.items()})
    given = dict(command_line(overrides, options))

    def where(key: str) -> str:
        return COMMAND_LINE if key in given else document.where(key)

    values = values_of({**document.texts, **given}, options, where)
    for key, mapping in document.mappings.items():
        values[key] = {**mapping, **values[key]}
    _anchor(values, document, given)
    return made_of(Config, values)


def dump_config(config: Config, explain: bool = False) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one.

    Args:
        explain: put each field's documentation above it.
    """
    lines = [line for name, section in _fields(config) for line in (f"{name}:", *_lines(section, f"{name}.", explain))]
    return "\n".join(lines) + "\n"


def _lines(section: Any, prefix: str, explain: bool) -> Iterator[str]:
    """A section's lines, indented."""
    for name, value in _fields(section):
        if dataclasses.is_dataclass(value):
            yield f"  {name}:"
            yield from (f"  {line}" for line in _lines(value, f"{prefix}{name}.", explain))
            continue
        if explain:
            yield from (f"  # {line}" for line in textwrap.wrap(config_options()[f"{prefix}{name}"].text, 110))
        yield from (f"  {line}" for line in to_yaml({name: value}).splitlines())


def _fields(of: Any) -> Iterator[tuple[str, Any]]:
    return ((entry.name, getattr(of, entry.name)) for entry in dataclasses.fields(of))


def config_parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser with an option for each field, grouped by sections: for its help."""
    groups: dict[str, tuple[str, Options]] = {}
    for name, section in get_type_hints(Config).items():
        own = {key: option for key, option in config_options().items() if key.startswith(f"{name}.")}
        groups[name] = ((section.__doc__ or "").strip(), own)
    return parser(prog, description, groups)


@cache
def config_options() -> Options:
    """The options of all sections, in their order."""
    return options_of(Config)


def _anchor(values: dict[str, Any], document: Document, given: dict[str, str]) -> None:
    """Make paths absolute, in place."""
    for key in ("target.path", "data.train", "data.heldout", "data.cache_dir", "draft.init_from"):
        base, hub = Path() if key in given else document.path.parent, key.startswith(("target.", "data.t", "data.h"))
        if isinstance(values[key], list):
            values[key] = [anchored(text, base, hub) for text in values[key]]
        elif values[key] is not None:
            values[key] = anchored(values[key], base, hub)
    values["run.dir"] = anchored(values["run.dir"], Path())
    values["run.name"] = values["run.name"] or Path(values["run.dir"]).name

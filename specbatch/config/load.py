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
from specbatch.config.profile import is_path, read_profile
from specbatch.config.sections import Config
from specbatch.config.write import to_yaml

if TYPE_CHECKING:
    import jsonargparse


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Paths in the file are relative to it, those among the overrides to the current directory, and so is ``run.dir``.
    Where it names a profile (``slurm.profile``), that is read first, and everything in the file comes before it.

    Args:
        path: a YAML file.
        overrides: ``--training.learning_rate 1e-3``, ``--training.learning_rate=1e-3``, ...

    Raises:
        UserError: for a file that can't be read, an unknown key, or a value that a field can't have: with file and
            line, and what would do. What depends on two fields or on other files is not looked at.
    """
    options = config_options()
    hints = {name: option.hint for name, option in options.items()}
    document = read_document(path, hints)
    given = dict(command_line(overrides, options))
    documents = [document]

    def where(key: str) -> str:
        if key in given:
            return COMMAND_LINE
        return next((found for found in documents if key in found.lines), document).where(key)

    name = given.get("slurm.profile", document.texts.get("slurm.profile", ""))
    if name:
        base = Path() if "slurm.profile" in given else document.path.parent
        documents.append(read_profile(name, base, where("slurm.profile"), hints))
    texts: dict[str, str] = {}
    mappings: dict[str, dict[str, Any]] = {}
    for found in reversed(documents):
        texts.update(found.texts)
        for key, mapping in found.mappings.items():
            mappings[key] = {**mappings.get(key, {}), **mapping}
    values = values_of({**texts, **given}, options, where)
    for key, mapping in mappings.items():
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
    if is_path(values["slurm.profile"]):
        base = Path() if "slurm.profile" in given else document.path.parent
        values["slurm.profile"] = anchored(values["slurm.profile"], base)
    values["run.dir"] = anchored(values["run.dir"], Path())
    values["run.name"] = values["run.name"] or Path(values["run.dir"]).name

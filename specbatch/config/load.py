"""Reads and writes a configuration: a YAML file, whose fields can be overridden on the command line.

Both become text arguments that jsonargparse parses, so that a value means the same in both.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from specbatch.config.algorithms import ALGORITHM, algorithm_names, default_algorithm, draft_section
from specbatch.config.document import Document, glimpse, read_document
from specbatch.config.options import COMMAND_LINE, Options, command_line, made_of, options_of, parser, values_of
from specbatch.config.paths import anchored
from specbatch.config.profile import is_path, read_profile
from specbatch.config.sections import Config
from specbatch.config.write import to_yaml

if TYPE_CHECKING:
    import jsonargparse


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration. Paths in the file are relative to it; ``run.dir`` and paths among the overrides are
    relative to the current directory. A profile (``slurm.profile``) supplies what the file does not say.

    Args:
        path: a YAML file.
        overrides: ``--training.learning_rate 1e-3``, ``--training.learning_rate=1e-3``, ...

    Raises:
        UserError: the file can't be read, or has an unknown key or an invalid value; with file, line, and what would be
            valid. Dependencies between fields and on other files are not checked.
    """
    algorithm = _algorithm(path, overrides)
    options = config_options(algorithm)
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
    sections: dict[str, Any] = {
        name: made_of(kind, values, f"{name}.") for name, kind in section_types(algorithm).items()
    }
    return Config(**sections)


def _algorithm(path: Path, overrides: Sequence[str]) -> str:
    """Return the algorithm that a configuration names, which determines the fields of the ``draft`` section.

    Raises:
        UserError: there is no algorithm of this name.
    """
    name, where = glimpse(path, "draft", "algorithm")
    for index, token in enumerate(overrides):
        key, equals, text = token.partition("=")
        if key == f"--{ALGORITHM}":
            name, where = text if equals else "".join(overrides[index + 1 : index + 2]), COMMAND_LINE
    if not name:
        return default_algorithm()
    draft_section(name, where)
    return name


def dump_config(config: Config, explain: bool = False) -> str:
    """Return the configuration as YAML, which `load_config` reads back as an equal one.

    Args:
        explain: put each field's documentation above it.
    """
    options = config_options(config.draft.algorithm) if explain else None
    lines = [line for name, section in _fields(config) for line in (f"{name}:", *_lines(section, f"{name}.", options))]
    return "\n".join(lines) + "\n"


def _lines(section: Any, prefix: str, options: Options | None) -> Iterator[str]:
    """Yield a section's lines, indented, each below its option's text if options are given."""
    for name, value in _fields(section):
        if dataclasses.is_dataclass(value):
            yield f"  {name}:"
            yield from (f"  {line}" for line in _lines(value, f"{prefix}{name}.", options))
            continue
        if options is not None:
            yield from (f"  # {line}" for line in textwrap.wrap(options[f"{prefix}{name}"].text, 110))
        yield from (f"  {line}" for line in to_yaml({name: value}).splitlines())


def _fields(of: Any) -> Iterator[tuple[str, Any]]:
    return ((entry.name, getattr(of, entry.name)) for entry in dataclasses.fields(of))


def config_groups() -> dict[str, tuple[str, Options]]:
    """Return text and options of each section, by title; fields of ``draft`` of a single algorithm are separate."""
    groups: dict[str, tuple[str, Options]] = {}
    for name, section in section_types(default_algorithm()).items():
        groups[name] = ((section.__doc__ or "").strip(), options_of(section, f"{name}."))
    for name in algorithm_names():
        section = draft_section(name)
        known = {option for _, options in groups.values() for option in options}
        own = {key: option for key, option in options_of(section, "draft.").items() if key not in known}
        if own:
            groups[f"draft, with draft.algorithm: {name}"] = ((section.__doc__ or "").strip(), own)
    return groups


def config_parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    """Return a parser with an option for each field, grouped by section, that prints the help."""
    return parser(prog, description, config_groups())


@cache
def config_options(algorithm: str = "") -> Options:
    """Return the options of all sections, in order.

    Args:
        algorithm: determines the fields of the ``draft`` section; the default algorithm if empty.
    """
    sections = section_types(algorithm or default_algorithm())
    return {key: option for name, kind in sections.items() for key, option in options_of(kind, f"{name}.").items()}


def section_types(algorithm: str) -> dict[str, type]:
    """Return the dataclass of each section."""
    return get_type_hints(Config) | {"draft": draft_section(algorithm)}


def _anchor(values: dict[str, Any], document: Document, given: dict[str, str]) -> None:
    """Make paths absolute, in place."""
    for key in ("target.path", "data.train", "data.heldout", "data.cache_dir", "draft.init_from"):
        base, hub = Path() if key in given else document.path.parent, key.startswith(("target.", "data.t", "data.h"))
        if isinstance(values[key], list):
            values[key] = [anchored(text, base, hub) for text in values[key]]
        elif values[key] is not None:
            values[key] = anchored(values[key], base, hub)
    for name, text in values["evaluate.sets"].items():
        base = Path() if f"evaluate.sets.{name}" in given else document.path.parent
        values["evaluate.sets"][name] = anchored(str(text), base)
    file, colon, function = values["data.transform"].rpartition(":")
    if file.endswith(".py"):
        base = Path() if "data.transform" in given else document.path.parent
        values["data.transform"] = anchored(file, base) + colon + function
    if is_path(values["slurm.profile"]):
        base = Path() if "slurm.profile" in given else document.path.parent
        values["slurm.profile"] = anchored(values["slurm.profile"], base)
    values["run.dir"] = anchored(values["run.dir"], Path())
    values["run.name"] = values["run.name"] or Path(values["run.dir"]).name

"""A configuration file as text values with their line numbers, so that messages can name the line and names stay as
written.

YAML guesses types from how a value looks: `2026-11-25` becomes a date, `on` becomes true, `1e-4` stays text. Here the
field's type decides: every value is kept as the text in the file. Types are guessed, by the rules of YAML 1.2, only
where any type is allowed, as in ``inference.sglang``.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from specbatch.config.algorithms import owners
from specbatch.config.rules import describe, optional, split
from specbatch.config.sections import Config
from specbatch.errors import UserError


class Loader(yaml.SafeLoader):
    """PyYAML with the core schema of YAML 1.2: no dates, no `on`, and its rules for numbers."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))
Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: _float(node.value.replace("_", "")))
Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


@dataclass
class Document:
    """The content of a configuration file."""

    path: Path
    texts: dict[str, str] = field(default_factory=dict)
    """Text of each dotted key; a JSON list if the field is a list."""
    mappings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Values of the fields that hold a mapping."""
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """File and line of a key, as far as known."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else str(self.path)


def glimpse(path: Path, section: str, key: str) -> tuple[str, str]:
    """Return the text of one field of a configuration file, and its place; both empty if the field is missing or
    `read_document` would refuse the file."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return "", ""
    for name in (section, key):
        if not isinstance(root, yaml.MappingNode):
            return "", ""
        root = next((value for found, value in root.value if found.value == name), None)
    if not isinstance(root, yaml.ScalarNode) or root.tag.endswith(":null"):
        return "", ""
    return root.value, f"{path}:{root.start_mark.line + 1}"


def read_document(path: Path, hints: Mapping[str, Any]) -> Document:
    """Read a configuration file.

    Args:
        hints: type of each field, by dotted key.

    Raises:
        UserError: it can't be read, is not YAML, or has unknown or duplicate keys.
    """
    document = Document(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    sections = get_type_hints(Config)
    for name, node in _items(root, "", document):
        if name not in sections:
            raise UserError(f"{document.where(name)}: {unknown(name, hints)}")
        for leaf, value in _leaves(node, f"{name}.", hints, document):
            if leaf not in hints:
                raise UserError(f"{document.where(leaf)}: {unknown(leaf, hints)}")
            if get_origin(split(hints[leaf])[0]) is dict:
                document.mappings[leaf] = _mapping(value, leaf, document)
                continue
            if leaf == "data.train":
                value, weights = _weighted(value, document)
                if weights:
                    document.texts["data.weights"] = json.dumps(weights)
            try:
                document.texts[leaf] = text_of(value, hints[leaf])
            except ValueError as error:
                raise UserError(
                    f"{document.where(leaf)}: {leaf}: {error} is given; it must be {describe(hints[leaf])}"
                ) from error
    return document


def text_of(node: yaml.Node | str, hint: Any) -> str:
    """Return the value of a field in the file or on the command line as text; a JSON list if the field is a list. A
    single value for a list becomes a list of one.

    Raises:
        ValueError: it is a mapping or empty, which the field does not allow.
    """
    kind, nullable = optional(split(hint)[0])
    kind = split(kind)[0]
    listed = get_origin(kind) is list
    if isinstance(node, str):
        if not (listed and node.lstrip().startswith("[")):
            return json.dumps([node]) if listed and not (nullable and node == "null") else node
        node = yaml.compose(node, Loader=Loader)
    if isinstance(node, yaml.ScalarNode):
        null = node.tag.endswith(":null")
        if null and not nullable and kind is not str:
            raise ValueError(node.value or "no value")
        return "null" if null and nullable else text_of(node.value, hint)
    if not isinstance(node, yaml.SequenceNode) or not all(isinstance(child, yaml.ScalarNode) for child in node.value):
        raise ValueError("a mapping")
    texts = listed and split(get_args(kind)[0])[0] is str
    return json.dumps([child.value if texts else _plain(child) for child in node.value], ensure_ascii=False)


def unknown(key: str, hints: Mapping[str, Any]) -> str:
    """Return a sentence about an unknown key, with the nearest known one."""
    sections = list(get_type_hints(Config))
    if not any("." in known and known.partition(".")[0] in sections for known in hints):
        near = difflib.get_close_matches(key, hints, n=1, cutoff=0.3)
        return f"{key}: there is no such option" + (f"; did you mean {near[0]}?" if near else "")
    section, _, name = key.partition(".")
    here = [known for known in hints if known.startswith(f"{section}.")]
    if section == "draft" and name and (others := owners(name)):
        return f"{key}: is a field of draft.algorithm: {' or '.join(others)}; set that, or leave the field out"
    elsewhere = [known for known in hints if known.split(".")[-1] == (name or section)]
    if section in sections and not name:
        return f"{key}: is a section; its keys are {', '.join(here)}"
    if elsewhere:
        return f"{key}: there is no such key; did you mean {' or '.join(elsewhere)}?"
    if section not in sections:
        near = difflib.get_close_matches(section, sections, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the sections are {', '.join(sections)}"
        return f"{key}: there is no section {section}; {hint}"
    near = difflib.get_close_matches(name, [known.split(".", 1)[1] for known in here], n=1, cutoff=0.3)
    hint = f"did you mean {section}.{near[0]}?" if near else f"the keys are {', '.join(here)}"
    return f"{key}: there is no such key; {hint}"


def _leaves(
    node: yaml.Node, prefix: str, hints: Mapping[str, Any], document: Document
) -> Iterator[tuple[str, yaml.Node]]:
    """Yield the dotted keys of a section and its subsections, and their nodes."""
    for name, value in _items(node, prefix, document):
        if any(known.startswith(f"{name}.") for known in hints):
            yield from _leaves(value, f"{name}.", hints, document)
        else:
            yield name, value


def _items(node: yaml.Node | None, prefix: str, document: Document) -> Iterator[tuple[str, yaml.Node]]:
    """Yield the dotted keys of a mapping, and their nodes."""
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        return
    if not isinstance(node, yaml.MappingNode):
        name = prefix.rstrip(".") or "the file"
        raise UserError(f"{document.path}:{node.start_mark.line + 1}: {name}: must be a mapping of keys to values")
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in document.lines:
            raise UserError(f"{document.path}:{key.start_mark.line + 1}: {name} is in the file twice")
        document.lines[name] = key.start_mark.line + 1
        yield name, value


def _weighted(node: yaml.Node, document: Document) -> tuple[yaml.Node, list[str]]:
    """Return the paths of ``data.train`` and their weights, if entries are written as ``{path: ..., weight: ...}``."""
    entries = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not any(isinstance(entry, yaml.MappingNode) for entry in entries):
        return node, []
    paths, weights = [], []
    for entry in entries:
        where = f"{document.path}:{entry.start_mark.line + 1}: data.train"
        if isinstance(entry, yaml.ScalarNode):
            paths.append(entry)
            weights.append("1")
            continue
        pairs = {key.value: value for key, value in entry.value} if isinstance(entry, yaml.MappingNode) else {}
        if "path" not in pairs or set(pairs) - {"path", "weight"}:
            raise UserError(
                f"{where}: an entry is a path, or a mapping of path and weight: {{path: a.jsonl, weight: 2}}"
            )
        paths.append(pairs["path"])
        weights.append(pairs["weight"].value if "weight" in pairs else "1")
    return yaml.SequenceNode(node.tag, paths, node.start_mark, node.end_mark), weights


def _mapping(node: yaml.Node, key: str, document: Document) -> dict[str, Any]:
    try:
        value = _plain(node) or {}
    except ValueError as error:
        raise UserError(f"{document.where(key)}: {key}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{document.where(key)}: {key}: must be a mapping of keys to values")
    if isinstance(node, yaml.MappingNode):
        document.lines.update((f"{key}.{name.value}", name.start_mark.line + 1) for name, _ in node.value)
    return value


def _plain(node: yaml.Node) -> Any:
    """Return the value of a node, with guessed types.

    Raises:
        ValueError: YAML's core schema does not have its type.
    """
    loader = Loader("")
    try:
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{getattr(error, 'problem', None) or error}") from error
    finally:
        loader.dispose()

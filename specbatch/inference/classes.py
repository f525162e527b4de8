"""Finds SGLang's model classes that provide the states of chosen layers, by reading its source.

It is not imported: that takes half a minute, and on the host where a run is submitted it may need a missing driver. A
class captures if it or one of its base classes has SGLang's method for it, or if specbatch's plugin adds one.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from specbatch.drafts.sglang import CAPTURE_METHOD, DELEGATING
from specbatch.errors import UserError

_PACKAGE = "sglang.srt.models"
_OTHERS = "SGLANG_EXTERNAL_MODEL_PACKAGE"
"""If this variable is set, classes may come from anywhere."""
_LOADED_IN_PART = {
    "Llama4ForCausalLM": "leaves the experts' weights of this class as they were before loading; the published "
    "checkpoints are of the class Llama4ForConditionalGeneration, which it loads whole",
}
"""Classes whose states would be those of a model with random weights, and what is wrong with each."""
_NEAR = 6
_DRAFTS = ("NextN", "MTP", "Eagle", "Eagle3")
"""Suffixes of the names of drafts."""
_STEM = re.compile(r".+?(?=For[A-Z])|.+")
"""Matches a model's name in its class name."""


@dataclass(frozen=True)
class _Module:
    """A source file: its classes by name, with their bases and whether they have the method, and what it imports."""

    classes: dict[str, tuple[tuple[str, ...], bool]]
    imports: dict[str, tuple[str, str]]
    """Imported names, each with its module and original name."""
    entries: frozenset[str]
    """Names in `EntryClass`, which configurations use."""


def check_class(architecture: str, where: Path) -> None:
    """Check that SGLang's class for a target captures.

    Args:
        architecture: the first of ``architectures`` in its config.json.
        where: the target's directory, for the message.

    Raises:
        UserError: it does not, or is not loaded whole. Nothing is checked if SGLang is not installed.
    """
    folder = _folder()
    if folder is None or not architecture or architecture in DELEGATING or os.environ.get(_OTHERS):
        return
    if why := _LOADED_IN_PART.get(architecture):
        version = importlib.metadata.version("sglang")
        raise UserError(f"target.path: {where} is a {architecture}, and SGLang {version} {why}")
    sources = [path for path in folder.rglob("*.py") if _defines(path, architecture)]
    if any(_captures(_name(folder, path), architecture) for path in sources):
        return
    version = importlib.metadata.version("sglang")
    known = capturing_classes()
    stems = {name: _STEM.match(name)[0].lower() for name in (*known, architecture)}  # type: ignore[index]
    near = sorted(
        (name for name in known if not name.endswith(_DRAFTS)),
        key=lambda name: -difflib.SequenceMatcher(None, stems[name], stems[architecture]).ratio(),
    )[:_NEAR]
    why = "has no class" if not sources else f"hands out no hidden states of its class {architecture}"
    raise UserError(
        f"target.path: {where} is a {architecture}, and SGLang {version} {why}{'' if sources else ' of that name'}: "
        f"no draft can be trained for it. It does for {len(known)} classes; near ones are {', '.join(near)}"
    )


@cache
def capturing_classes() -> tuple[str, ...]:
    """Return the installed SGLang's classes that configurations may name and that capture; empty without SGLang."""
    folder = _folder()
    if folder is None:
        return ()
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        if "EntryClass" not in _text(path):
            continue
        name = _name(folder, path)
        found.update(entry for entry in _module(name).entries if entry in DELEGATING or _captures(name, entry))
    return tuple(sorted(found))


def _folder() -> Path | None:
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "srt" / "models"
    return folder if folder.is_dir() else None


def _name(folder: Path, path: Path) -> str:
    return ".".join((_PACKAGE, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _defines(path: Path, name: str) -> bool:
    return re.search(rf"^class {re.escape(name)}\b", _text(path), re.MULTILINE) is not None


@cache
def _captures(module: str, name: str) -> bool:
    """Return whether a class of a module has the method, or inherits it."""
    source = _module(module)
    if name in source.imports:
        there, original = source.imports[name]
        return there.startswith(_PACKAGE) and (there, original) != (module, name) and _captures(there, original)
    if name not in source.classes:
        return False
    bases, has_it = source.classes[name]
    return has_it or any(_captures(module, base) for base in bases if base != name)


@cache
def _module(name: str) -> _Module:
    folder = _folder()
    parts = name.removeprefix(_PACKAGE).strip(".").split(".") if folder else []
    places = (
        [] if folder is None else [folder.joinpath(*parts).with_suffix(".py"), folder.joinpath(*parts, "__init__.py")]
    )
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return _Module({}, {}, frozenset())
    classes: dict[str, tuple[tuple[str, ...], bool]] = {}
    imports: dict[str, tuple[str, str]] = {}
    entries: set[str] = set()
    for node in ast.parse(_text(path)).body:
        if isinstance(node, ast.ClassDef):
            bases = tuple(base.id for base in node.bases if isinstance(base, ast.Name))
            own = any(isinstance(item, ast.FunctionDef) and item.name == CAPTURE_METHOD for item in node.body)
            classes[node.name] = (bases, own)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports.update({(alias.asname or alias.name): (node.module, alias.name) for alias in node.names})
        elif isinstance(node, ast.Assign) and any(getattr(goal, "id", "") == "EntryClass" for goal in node.targets):
            entries.update(item.id for item in ast.walk(node.value) if isinstance(item, ast.Name))
    return _Module(classes, imports, frozenset(entries))

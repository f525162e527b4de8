"""Finds the installed draft algorithms, and their fields of the configuration's ``draft`` section.

They are found through the entry point group ``specbatch.drafts``: ``name = "package.module:Class"``, with a subclass of
`specbatch.drafts.base.Algorithm`.
"""

from __future__ import annotations

import dataclasses
import difflib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from specbatch.config.sections import Draft
from specbatch.errors import UserError

GROUP = "specbatch.drafts"
ALGORITHM = "draft.algorithm"
"""The field that names the algorithm."""


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


@cache
def default_algorithm() -> str:
    """Return the name of the algorithm that is used if a configuration names none."""
    return next(name for name in algorithm_names() if algorithm_class(name).default)


def algorithm_names() -> list[str]:
    """Return the names of the installed algorithms, sorted."""
    return list(_entries())


@cache
def algorithm_class(name: str, where: str = "") -> Any:
    """Return the class of an algorithm.

    Args:
        where: place of the name, for messages.

    Raises:
        UserError: there is no algorithm of this name, or its package can't be imported.
    """
    found = _entries().get(name)
    prefix = f"{where}: " if where else ""
    if found is None:
        known = algorithm_names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none: reinstall specbatch'}"
        raise UserError(f"{prefix}draft.algorithm: there is no algorithm {name}; {hint}")
    try:
        return found.load()
    except Exception as error:
        raise UserError(f"{prefix}draft.algorithm: {name} ({found.value}) can't be imported: {error!r}") from error


def draft_section(name: str, where: str = "") -> type[Draft]:
    """Return the ``draft`` section of an algorithm. Raises the same as `algorithm_class`."""
    section: type[Draft] = algorithm_class(name, where).section
    return section


def owners(field: str) -> list[str]:
    """Return the installed algorithms whose ``draft`` section has a field."""
    return [
        name for name in algorithm_names() if field in {entry.name for entry in dataclasses.fields(draft_section(name))}
    ]

"""Rules for values of a configuration in addition to their types, and their wording for users."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

_UNITS = {"": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_NOUNS = {int: "an integer", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}


@dataclass(frozen=True)
class Rule:
    """A condition on a value, given with ``Annotated``."""

    text: str
    """Continues a noun: ``of at least 1``."""
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    return Rule(f"of at least {low}", lambda value: value >= low)


def above(low: float) -> Rule:
    return Rule(f"above {low}", lambda value: value > low)


def below(high: float) -> Rule:
    return Rule(f"below {high}", lambda value: value < high)


def at_most(high: float) -> Rule:
    return Rule(f"at most {high}", lambda value: value <= high)


def between(low: float, high: float) -> Rule:
    """Return a rule for an interval that includes both ends."""
    return Rule(f"from {low} to {high}", lambda value: low <= value <= high)


NOT_EMPTY = Rule("that is not empty", bool)
ONE_LINE = Rule("that is in one line", lambda value: not re.search(r"[\n\r\0]", value))


class Bytes(int):
    """A number of bytes, written as digits or with a binary unit: ``4GiB``."""

    @classmethod
    def parse(cls, text: str | int) -> Bytes:
        """Parse a number of bytes.

        Raises:
            ValueError: it is not digits, or digits with KiB, MiB, GiB or TiB.
        """
        found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([KMGT]iB|)", str(text))
        if not found or ("." in found[1] and not found[2]):
            raise ValueError(f"{text} is not a number of bytes")
        return cls(float(found[1]) * (1 << _UNITS[found[2]]) if "." in found[1] else int(found[1]) << _UNITS[found[2]])

    def __str__(self) -> str:
        """Return the shortest exact text."""
        for unit, shift in reversed(_UNITS.items()):
            if self and self % (1 << shift) == 0:
                return f"{int(self) >> shift}{unit}"
        return str(int(self))


class Interval(str):
    """How often something is done: a number of steps (``100``), a time (``10min``), or ``auto``."""

    @classmethod
    def parse(cls, text: str | int) -> Interval:
        """Parse an interval.

        Raises:
            ValueError: it is not a number of at least 1, a number with s, min or h, or ``auto``.
        """
        made = cls(text)
        if made != "auto" and not (made.steps or made.seconds):
            raise ValueError(f"{text} is not an interval")
        return made

    @property
    def steps(self) -> int | None:
        """Number of steps; None if it is a time or ``auto``."""
        return int(self) if re.fullmatch(r"\d[\d_]*", self) else None

    @property
    def seconds(self) -> float | None:
        """Number of seconds; None unless it is a time."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", self)
        return float(found[1]) * _SECONDS[found[2]] if found else None


def describe(hint: Any) -> str:
    """Describe a type with its rules: ``an integer of at least 1``."""
    hint, rules = split(hint)
    inner, nullable = optional(hint)
    if nullable:
        return f"{describe(inner)}, or null"
    origin, example = get_origin(hint), ""
    if origin is Literal:
        words = "one of " + ", ".join(map(str, get_args(hint))) if len(get_args(hint)) > 1 else str(get_args(hint)[0])
    elif origin is list:
        element = get_args(hint)[0]
        words = "a list"
        named = get_args(split(element)[0]) if get_origin(split(element)[0]) is Literal else (1, 2)
        shown = ", ".join(map(str, named))
        example = (
            ", for example [a, b]" if split(element)[0] is str else f", for example [{shown}], each {describe(element)}"
        )
    elif origin is tuple:
        words = f"{len(get_args(hint))} values, each {describe(get_args(hint)[0])}"
    elif hint is Interval:
        words, example = "a number of steps, a time or auto", ": 100, 10min, 2h or auto"
    elif hint is Bytes:
        words, example = "a number of bytes", ", for example 4GiB or 4294967296"
    else:
        words = _NOUNS[origin or hint]
    return " ".join([words, " and ".join(rule.text for rule in rules)]).rstrip() + example


def broken(hint: Any, value: Any) -> bool:
    """Return whether a value of the right type, or one of its elements, breaks a rule."""
    hint, rules = split(hint)
    inner, nullable = optional(hint)
    if nullable:
        return value is not None and broken(inner, value)
    if isinstance(value, float) and not math.isfinite(value):
        return True
    if get_origin(hint) in (list, tuple) and any(broken(get_args(hint)[0], element) for element in value):
        return True
    return not all(rule.holds(value) for rule in rules)


def split(hint: Any) -> tuple[Any, list[Rule]]:
    """Split a type into the type without its rules, and the rules."""
    if get_origin(hint) is Annotated:
        kind, *extras = get_args(hint)
        return kind, [extra for extra in extras if isinstance(extra, Rule)]
    return hint, []


def optional(hint: Any) -> tuple[Any, bool]:
    """Split a type into the type without None, and whether None was allowed."""
    if get_origin(hint) in (Union, UnionType):
        return next(kind for kind in get_args(hint) if kind is not NoneType), True
    return hint, False

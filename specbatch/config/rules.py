"""What a value of the configuration may be, beyond its type, and how that is said to the user."""

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
    """A condition, given with ``Annotated``."""

    text: str
    """Goes on after a noun: ``of at least 1``."""
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
    """Both ends belong to it."""
    return Rule(f"from {low} to {high}", lambda value: low <= value <= high)


NOT_EMPTY = Rule("that is not empty", bool)
ONE_LINE = Rule("that is in one line", lambda value: not re.search(r"[\n\r\0]", value))


class Bytes(int):
    """A number of bytes; written as digits or with a binary unit: ``4GiB``."""

    @classmethod
    def parse(cls, text: str | int) -> Bytes:
        """Read it.

        Raises:
            ValueError: for anything else than digits and KiB, MiB, GiB or TiB.
        """
        found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([KMGT]iB|)", str(text))
        if not found or ("." in found[1] and not found[2]):
            raise ValueError(f"{text} is no number of bytes")
        return cls(float(found[1]) * (1 << _UNITS[found[2]]) if "." in found[1] else int(found[1]) << _UNITS[found[2]])

    def __str__(self) -> str:
        """The shortest exact way to write it."""
        for unit, shift in reversed(_UNITS.items()):
            if self and self % (1 << shift) == 0:
                return f"{int(self) >> shift}{unit}"
        return str(int(self))


class Interval(str):
    """How often something is done: every so many steps (``100``), after a time (``10min``), or ``auto``."""

    @classmethod
    def parse(cls, text: str | int) -> Interval:
        """Read it.

        Raises:
            ValueError: for anything else than a number of at least 1, one with s, min or h, or ``auto``.
        """
        made = cls(text)
        if made != "auto" and not (made.steps or made.seconds):
            raise ValueError(f"{text} is no interval")
        return made

    @property
    def steps(self) -> int | None:
        """Steps, where it counts those."""
        return int(self) if re.fullmatch(r"\d[\d_]*", self) else None

    @property
    def seconds(self) -> float | None:
        """Seconds, where it is a time."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", self)
        return float(found[1]) * _SECONDS[found[2]] if found else None


def describe(hint: Any) -> str:
    """A type with its rules as words: ``an integer of at least 1``."""
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
        example = ", as [a, b]" if split(element)[0] is str else f", as [1, 2], each {describe(element)}"
    elif origin is tuple:
        words = f"{len(get_args(hint))} values, each {describe(get_args(hint)[0])}"
    elif hint is Interval:
        words, example = "a number of steps, a time or auto", ", as 100, 10min, 2h or auto"
    elif hint is Bytes:
        words, example = "a number of bytes", ", as 4GiB or 4294967296"
    else:
        words = _NOUNS[origin or hint]
    return " ".join([words, " and ".join(rule.text for rule in rules)]).rstrip() + example


def has_rules(hint: Any) -> bool:
    """Whether a type says more than its name."""
    kind, rules = split(hint)
    return bool(rules) or kind in (Bytes, Interval) or any(has_rules(argument) for argument in get_args(kind))


def broken(hint: Any, value: Any) -> bool:
    """Whether a value of the right type breaks one of its rules, or one of its elements does."""
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
    """A type without its rules, and the rules."""
    if get_origin(hint) is Annotated:
        kind, *extras = get_args(hint)
        return kind, [extra for extra in extras if isinstance(extra, Rule)]
    return hint, []


def optional(hint: Any) -> tuple[Any, bool]:
    """A type without the possibility of null, and whether there was one."""
    if get_origin(hint) in (Union, UnionType):
        return next(kind for kind in get_args(hint) if kind is not NoneType), True
    return hint, False

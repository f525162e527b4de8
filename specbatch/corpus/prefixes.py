"""Finds out from a chat template's code whether the first messages of a conversation are rendered the same, whatever
messages follow.

This holds if the template goes through the messages once, from the first to the last, writes nothing afterwards but a
generation prompt, and never looks ahead. One rendering is then as good as one for each number of messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template, nodes

_MARK = "\0specbatch\0"
"""Written before each message; no text has it."""
_BACKWARD = ("index", "index0", "first", "previtem", "cycle", "changed", "depth", "depth0")
"""What a loop may be asked for without a look at the messages to come."""
_PROMPT = "add_generation_prompt"


def ends_of_messages(
    source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], text: str
) -> list[int] | None:
    """Return the length of the text of the first message, of the first two, and so on; None if that is not proved. The
    first two may be wrong, as a template may look at the first message after the system prompt in any case.

    Args:
        source: the chat template.
        variables: everything that it is given besides the messages.
        text: the conversation as it is rendered.
    """
    import jinja2

    template = _marked(source)
    if template is None or _MARK in text:
        return None
    try:
        pieces = template.render(messages=messages, **variables).split(_MARK)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return None
    skipped = len(messages) - len(pieces) + 1
    """Messages at the beginning, usually a system prompt, that the template does not go through."""
    if "".join(pieces) != text or not 0 <= skipped < len(messages):
        return None
    ends = list(accumulate(map(len, pieces)))
    return [ends[max(0, i - skipped + 1)] for i in range(len(messages))]


@lru_cache(maxsize=64)
def _marked(source: str) -> Template | None:
    """Return a template that also writes a mark before each message; None if it might look ahead."""
    import jinja2
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(source).environment
    tree = environment.parse(source)
    names = _names_of_messages(tree)
    loops = list(_loops(tree, names))
    if not loops or any(tree.find_all(nodes.Break)) or not all(_reads_forward(loop) for loop in loops):
        return None
    if not _are_last(tree.body, loops) or _other_uses(tree, names):
        return None
    for loop in loops:
        loop.body.insert(0, nodes.Output([nodes.TemplateData(_MARK)]))
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def _names_of_messages(tree: nodes.Template) -> set[str]:
    """Return the names of variables that hold the messages, with or without the first ones."""
    from jinja2 import nodes

    names = {"messages"}
    while True:
        found = {
            assigned.target.name
            for assigned in tree.find_all(nodes.Assign)
            if isinstance(assigned.target, nodes.Name) and _is_messages(assigned.node, names)
        }
        if found <= names:
            return names
        names |= found


def _is_messages(node: nodes.Node, names: set[str]) -> bool:
    """Return whether an expression is the messages, or all of them from a certain one on."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        start = node.arg.start
        forward = isinstance(start, nodes.Const) and type(start.value) is int and start.value >= 0
        return forward and node.arg.stop is None and node.arg.step is None and _is_messages(node.node, names)
    return isinstance(node, nodes.Name) and node.name in names


def _loops(tree: nodes.Node, names: set[str]) -> Iterator[nodes.For]:
    from jinja2 import nodes

    return (loop for loop in tree.find_all(nodes.For) if _is_messages(loop.iter, names))


def _reads_forward(loop: nodes.For) -> bool:
    """Return whether a loop is never asked about the messages to come."""
    from jinja2 import nodes

    def asked(node: nodes.Node) -> Iterator[bool]:
        for child in node.iter_child_nodes():
            if isinstance(child, nodes.Getattr) and isinstance(child.node, nodes.Name) and child.node.name == "loop":
                yield child.attr in _BACKWARD
            elif isinstance(child, nodes.Name) and child.name == "loop":
                yield False
            elif isinstance(child, nodes.For):
                yield from asked(child.iter)  # in its body the name is its own
            else:
                yield from asked(child)

    return not loop.test and not loop.else_ and not loop.recursive and all(asked(loop))


def _are_last(body: Sequence[nodes.Node], loops: list[nodes.For]) -> bool:
    """Return whether nothing that is written after a loop over the messages depends on them."""
    from jinja2 import nodes

    holders = [
        i for i, node in enumerate(body) if node in loops or any(loop in loops for loop in node.find_all(nodes.For))
    ]
    if not holders:
        return True
    if len(holders) > 1 or not all(_is_silent(node) for node in body[holders[0] + 1 :]):
        return False
    holder = body[holders[0]]
    if isinstance(holder, nodes.For):
        return holder in loops and not any(loop in loops for loop in holder.find_all(nodes.For))
    if not isinstance(holder, nodes.If):
        return False
    return all(
        _are_last(branch, loops) for branch in (holder.body, *(other.body for other in holder.elif_), holder.else_)
    )


def _is_silent(node: nodes.Node) -> bool:
    """Return whether a node writes nothing if no generation prompt is asked for."""
    from jinja2 import nodes

    if isinstance(node, nodes.If):
        test = node.test.left if isinstance(node.test, nodes.And) else node.test
        return isinstance(test, nodes.Name) and test.name == _PROMPT and not node.elif_ and not node.else_
    return isinstance(node, nodes.Assign | nodes.Macro)


def _other_uses(tree: nodes.Node, names: set[str]) -> bool:
    """Return whether the messages are used otherwise than one after the other, or the first one."""
    from jinja2 import nodes

    for child in tree.iter_child_nodes():
        if isinstance(child, nodes.Name) and child.name in names and child.ctx == "load":
            return True
        if isinstance(child, nodes.Getitem) and _is_messages(child.node, names):
            if not isinstance(child.arg, nodes.Const) or child.arg.value != 0:
                return True
            continue
        if isinstance(child, nodes.Assign) and _is_messages(child.node, names):
            if not isinstance(child.target, nodes.Name):
                return True
            continue
        if isinstance(child, nodes.For) and _is_messages(child.iter, names):
            if any(_other_uses(nodes.Template([part]), names) for part in child.body):
                return True
            continue
        if _other_uses(child, names):
            return True
    return False

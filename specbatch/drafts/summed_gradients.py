"""Gradients that a chunked backward pass accumulates in its forward pass, and returns in its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def add_to(totals: Iterable[Tensor], parts: Iterable[Tensor]) -> None:
    """Add to each total its part. A function, so that no variable keeps the last part alive."""
    for total, part in zip(totals, parts, strict=True):
        total += part


def add_gradients(result: Tensor, gradient: Tensor, leaves: list[Tensor], totals: list[Tensor]) -> None:
    """Differentiate, and add the gradient of each leaf to its total as soon as it is known: all at once would take as
    much memory as all layers.

    Args:
        leaves: tensors without a graph of their own, each of which has one part in the result.
    """

    def moved(total: Tensor) -> Callable[[Tensor], Tensor]:
        def move(part: Tensor) -> Tensor:
            total.add_(part)
            return part.new_zeros(()).expand_as(part)

        return move

    hooks = [leaf.register_hook(moved(total)) for leaf, total in zip(leaves, totals, strict=True)]
    try:
        torch.autograd.grad(result, leaves, gradient)
    finally:
        for hook in hooks:
            hook.remove()


def keep(ctx: Any, totals: list[Tensor | None], tensors: Iterable[Tensor | None]) -> None:
    """Keep the gradients of these tensors for `given_away`; None for a tensor without gradient."""
    ctx.found, ctx.dtypes = totals, [None if x is None else x.dtype for x in tensors]


def given_away(ctx: Any, grad_2T: Tensor) -> list[Tensor | None]:
    """Return the kept gradients, scaled, in the dtypes of their tensors.

    Args:
        grad_2T: gradient of the result ``[2, T]``, of which only the sum of the first row may be differentiated.

    Raises:
        ValueError: they were returned before.
    """
    grad = grad_2T[0, 0]
    # Asynchronous: the device continues with the next pack, and fails there if this is wrong.
    torch._assert_async((grad_2T[0] == grad).all(), "only the sum of the weighted losses may be differentiated")
    found, ctx.found = ctx.found, None
    if found is None:
        raise ValueError("the gradient can be taken only once: it is scaled in place")
    # Handed over, not copied: the first to arrive becomes the parameter's gradient.
    given: list[Tensor | None] = []
    while found:
        total = found.pop(0)
        given.append(None if total is None else total.mul_(grad).to(ctx.dtypes[len(given)]))
    return given

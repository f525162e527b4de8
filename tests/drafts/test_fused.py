"""Functions that a GPU compiles, compiled for the CPU: the same values and gradients as the uncompiled ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from specbatch.drafts import fused
from specbatch.drafts.attention import gpu


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).requires_grad_()


def angles(count: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(count, 1, 4, generator=torch.Generator().manual_seed(1))
    return angle.cos(), angle.sin()


def target_of(count: int) -> tuple[Tensor, Tensor]:
    truth = leaf(count, 50, seed=1).detach().softmax(-1)
    return truth, truth.argmax(-1)


CASES: dict[str, tuple[fused.Fused, Callable[[int], tuple]]] = {
    "rms_norm": (fused.rms_norm, lambda n: (leaf(n, 24), leaf(24), 1e-5)),
    "rotate": (fused.rotate, lambda n: (leaf(n, 4, 8), *angles(n))),
    "swiglu": (fused.swiglu, lambda n: (leaf(n, 40), leaf(n, 40, seed=1))),
    "compare": (
        fused.compare,
        lambda n: (leaf(n, 50).detach(), *target_of(n), torch.tensor(0.3)),
    ),
    "acceptance": (
        fused.compare_by_acceptance,
        lambda n: (leaf(n, 50), *target_of(n), torch.tensor(0.3)),
    ),
    "both": (
        fused.compare_by_both,
        lambda n: (leaf(n, 50), *target_of(n), torch.tensor(0.3)),
    ),
    "dot": (gpu.dot, lambda n: (leaf(n, 4, 8), leaf(n, 2, 8))),
    "own_score": (gpu.own_score, lambda n: (leaf(n, 4, 8), leaf(n, 2, 8))),
    "weighted": (gpu.weighted, lambda n: (leaf(n, 2, 8), leaf(n, 4), 4)),
    "of_group": (gpu.of_group, lambda n: (leaf(n, 4, 8), leaf(n, 4), 2)),
}


@pytest.mark.light
@pytest.mark.parametrize("name", CASES)
def test_compiled_is_as_written_and_compiles_once_for_all_sizes(name: str):
    function, arguments = CASES[name]
    torch._dynamo.reset()
    for number, count in enumerate((7, 12, 33)):
        if number == 1:
            assert counters["stats"]["unique_graphs"]
            counters.clear()
        compiled, eager = outcome(function.compiled, arguments(count)), outcome(function.eager, arguments(count))
        torch.testing.assert_close(compiled, eager)
    assert not counters["stats"]["unique_graphs"]


def outcome(function: Callable, arguments: tuple) -> list[Tensor]:
    """Results, and the gradients of their sum."""
    result = function(*arguments)
    results = list(result) if isinstance(result, tuple) else [result]
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    if leaves:
        sum(r.sum() for r in results if r.requires_grad).backward()
    return [*(r.detach() for r in results), *(a.grad for a in leaves if a.grad is not None)]

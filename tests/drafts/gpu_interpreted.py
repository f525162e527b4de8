"""The kernels that FlexAttention becomes on an H100, run on a CPU by Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.drafts.gpu_interpreted FOLDER HEADS GROUPS WIDTH

puts what `tests.drafts.gpu_code` wrote into FOLDER in the place of FlexAttention's two passes, and prints as JSON how
often each kernel was launched, and how far the output and each gradient are from those of dense attention.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch._inductor.runtime import triton_helpers, triton_heuristics

from tests.drafts.gpu_code import KERNEL, LIVE, attend, compiled_by, kernels
from tests.drafts.test_attention import dense, gradients, make_case

LENGTHS = [130, 1, 40]
"""Lengths of the samples: others than were traced."""
XBLOCK = 128
"""Elements that one call of an elementwise kernel does."""


def known_by(kind: str) -> Callable[..., Any]:
    """Replaces the class that tunes and launches kernels."""
    return lambda **_: lambda function: SimpleNamespace(function=function, kind=kind)


def launcher(name: str, kernel: Any, launches: Counter[str]) -> SimpleNamespace:
    """Run all programs of a kernel in sequence, called by generated code."""

    def run(*args: Any, stream: int) -> None:
        launches[name] += 1
        if kernel.kind == "template":
            kernel.function[args[-3:]](*args[:-3])
        elif kernel.kind == "pointwise":
            kernel.function[triton.cdiv(args[-1], XBLOCK),](*args, XBLOCK=XBLOCK)
        else:
            kernel.function[args[-2],](*args, XBLOCK=1)

    return SimpleNamespace(run=run)


def loaded(path: Path, launches: Counter[str]) -> Callable[[list[Any]], Any]:
    """A pass, with tensors on the host."""
    code = path.read_text()
    launchers = {name: launcher(name, kernel, launches) for name, kernel in kernels(code, path.parent)}
    here: dict[str, Any] = {"launchers": launchers}
    code = KERNEL.sub(r"\1 = launchers['\1']", code)
    # Of the module, what asks for a driver.
    code = code.replace("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "")
    code = re.sub(r"(async_compile\.wait|torch\.cuda\.set_device)\(.*\)", "pass", code)
    code = code.replace("torch.cuda._DeviceGuard(0)", "guard").replace("empty_strided_cuda(", "empty(")
    here |= {"guard": nullcontext(), "get_raw_stream": lambda device: 0, "empty": empty}
    exec(compile(code, str(path), "exec"), here)
    return here["call"]


def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


def main() -> None:
    folder = Path(sys.argv[1])
    heads, groups, width = map(int, sys.argv[2:])
    triton_helpers.set_driver_to_gpu = lambda: None
    for kind in ("template", "pointwise", "persistent_reduction", "reduction"):
        setattr(triton_heuristics, kind, known_by(kind))
    launches: Counter[str] = Counter()

    def instead(name: str) -> Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[[list[Any]], Any]]:
        call = loaded(folder / f"{name}.py", launches)

        def run(args: list[Any]) -> Any:
            return call(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return lambda graph, inputs: run

    kernel = compiled_by(instead)
    case = make_case(LENGTHS, live=LIVE, dtype=torch.float32, heads=heads, groups=groups, width=width)
    out, expected = attend(kernel, case), dense(case)
    pairs = zip([out, *gradients(out, case)], [expected, *gradients(expected, case)], strict=True)
    apart = [(one - other).abs().max().item() for one, other in pairs]
    print(json.dumps({"launches": launches, "apart": apart}))


if __name__ == "__main__":
    main()

"""The kernels that FlexAttention becomes on an H100, made on a machine that has none.

    python -m tests.drafts.gpu_code FOLDER DTYPE HEADS GROUPS WIDTH

traces FlexAttention with its backward pass here, has torch's compiler write both down for an H100, and Triton compile
them for it, down to its machine code. FOLDER gets ``forward.py`` and ``backward.py``. Printed is, as JSON, how many
bytes of shared memory each kernel takes. `tests.drafts.gpu_interpreted` runs them.

What is pretended: a driver and a device that can be asked for its properties, and that tensors lie there.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch.nn.attention import flex_attention as flex_attention_module
from torch.utils import _triton
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specbatch.drafts.attention import gpu
from tests.drafts.test_attention import Case, make_case

LENGTHS, LIVE = [150, 20], 0.9
"""Lengths of the samples that are traced, and the share of their columns that are live: two blocks of queries and of
keys. A size of one would become a constant in the code, and equal numbers of queries and keys would become one
symbol."""
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    max_threads_per_block=1024, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
)  # fmt: skip
KERNEL = re.compile(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
"""Matches a kernel in the output of torch's compiler."""
Backend = Callable[[str], Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[[list[Any]], Any]]]


def compiled_by(compilers: Backend) -> Callable[..., Any]:
    """FlexAttention, compiled for all sizes with gradients.

    Args:
        compilers: of ``forward`` or ``backward``.
    """
    # It refuses gradients on a CPU, for which it has no kernel there.
    flex_attention_module._validate_device = lambda *_: None  # type: ignore[assignment]
    backend = aot_autograd(
        fw_compiler=compilers("forward"),
        bw_compiler=compilers("backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    return torch.compile(flex_attention_module.flex_attention, dynamic=True, backend=backend)


def attend(kernel: Callable[..., Any], case: Case) -> Tensor:
    """The attention of a GPU."""
    return gpu.attend(
        case.q, case.k, case.v, case.own, case.prefix_mask, prefix=partial(gpu.flex_prefix, kernel=kernel)
    )


def traced(case: Case) -> dict[str, tuple[torch.fx.GraphModule, Sequence[Any]]]:
    """Both passes, and what they are called with."""
    found: dict[str, tuple[torch.fx.GraphModule, Sequence[Any]]] = {}

    def keep(name: str) -> Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[[list[Any]], Any]]:
        def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
            found[name] = copy.deepcopy(graph), inputs

            def run(args: list[Any]) -> Any:
                return graph(*args)

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compiler

    attend(compiled_by(keep), case).sum().backward()
    return found


def pretend() -> None:
    """An H100 can be asked for its properties."""
    for place in (CudaInterface, CudaInterface.Worker, torch.cuda):
        place.get_device_properties = staticmethod(lambda device=None: H100)
        place.current_device = staticmethod(lambda: 0)
        place.is_available = staticmethod(lambda: True)
        place.device_count = staticmethod(lambda: 1)
        place.synchronize = staticmethod(lambda device=None: None)
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)
    CudaInterface.raise_if_triton_unavailable = staticmethod(lambda *_: None)
    CudaInterface.is_triton_capable = staticmethod(lambda device=None: True)
    torch.cuda.get_device_capability = lambda device=None: (H100.major, H100.minor)
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_: None
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda device: 0
    target = GPUTarget("cuda", 90, 32)
    shared = {"max_shared_mem": H100.shared_memory_per_block_optin, "multiprocessor_count": H100.multi_processor_count}
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0,
            utils=SimpleNamespace(get_device_properties=lambda device: shared),
        )
    )  # fmt: skip
    triton_helpers.set_driver_to_gpu = lambda: None
    # It has been asked before, and the answer was no.
    _triton.has_triton.cache_clear()


def written(name: str, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Return the code that torch's compiler generates of a pass for the simulated device."""
    mode = next(x.fake_mode for x in inputs if isinstance(x, Tensor))

    def there(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")

    code: list[str] = []

    def keep(lowering: GraphLowering) -> ModuleType:
        code.append(lowering.codegen()[0].value)
        raise Written

    GraphLowering.compile_to_module = keep  # type: ignore[method-assign]
    with mode, torch.no_grad():
        for module in graph.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                for key in {"val", "example_value"} & node.meta.keys():
                    node.meta[key] = tree_map(there, node.meta[key])
        moved = [there(x) for x in inputs]
    with tracing(TracingContext(mode)), torch.no_grad():
        try:
            compile_fx_inner(graph, moved, is_backward=name == "backward")
        except Exception:
            if not code:
                raise
    return code[0]


class Written(Exception):
    """There is nothing to run the code on."""


def kernels(code: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """Names of a pass's kernels, and what torch knows of each."""
    for name, source in KERNEL.findall(code):
        path = folder / f"{name}.py"
        path.write_text(source)
        sys.path.insert(0, str(folder))
        yield name, getattr(__import__(name), name)


def shared_bytes(kernel: Any) -> int:
    """Compile a kernel to machine code."""
    config = kernel.configs[0]
    meta = kernel.triton_meta
    signature = meta["signature"] | dict.fromkeys(config.kwargs, "constexpr")
    source = ASTSource(kernel.fn, signature, meta["constants"] | config.kwargs, meta["configs"][0])
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]
    return made.metadata.shared


def main() -> None:
    folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    heads, groups, width = map(int, sys.argv[3:])
    passes = traced(make_case(LENGTHS, live=LIVE, dtype=dtype, heads=heads, groups=groups, width=width))
    pretend()
    found = {}
    for name, (graph, inputs) in passes.items():
        code = written(name, graph, inputs)
        (folder / f"{name}.py").write_text(code)
        found |= {kernel: shared_bytes(about) for kernel, about in kernels(code, folder)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

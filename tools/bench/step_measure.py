"""One implementation of the training step, timed in this process."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop, flop_registry

from specbatch.training import blockwise, flex, memory
from tools.bench.plain_eagle3 import plain_step
from tools.bench.step_case import make_case, predicted_bytes

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16, as the vendors state them; on other devices a large matrix product is measured instead."""


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """Time one implementation in this process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    case = make_case(options, device, dtype)
    draft, pack = case.draft, case.pack

    def step() -> float:
        if options.only == "plain":
            return plain_step(draft, pack, case.states, case.weights)
        loss = draft(pack, case.weights)[0].sum()
        loss.backward()
        return loss.item()

    cuda = device.type == "cuda"
    before = 0 if cuda else resident("VmRSS", reset=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    counter = Operations()
    best = cpu = float("inf")
    for number in range(options.repeat + 1):
        draft.zero_grad()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        with contextlib.nullcontext() if number or cuda else counter:
            loss = step()
        if cuda:
            torch.cuda.synchronize()
        best, cpu = min(best, time.perf_counter() - begun), min(cpu, time.process_time() - begun_cpu)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    if cuda:
        # Nothing is compiled while operations are counted, so that step is neither timed nor in the peak.
        draft.zero_grad()
        with countable_attention(), counter:
            step()
    return {
        "tokens": options.tokens,
        "loss_share": pack.loss_mask.float().mean().item(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "loss": loss,
        "tokens_per_s": options.tokens / best,
        "operations": counter.total,
        "cpu_s": cpu,
        "share_of_peak": counter.total / best / peak_flops(device, dtype),
        "peak_bytes": peak - before,
        "predicted_bytes": predicted_bytes(case),
    }


def resident(kind: str, *, reset: bool = False) -> int:
    """Bytes of this process in memory: ``VmRSS`` now, ``VmHWM`` at most since the last reset (Linux).

    What is made ready for the step takes more at times than what is left of it, so the most ever would hide the step's.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) << 10


@contextlib.contextmanager
def countable_attention() -> Iterator[None]:
    """The CPU's attention on a GPU, in large blocks: FlexAttention is one operation, which can't be looked into."""
    kept = flex.attend, memory.CPU_BLOCK_SCORES
    flex.attend, memory.CPU_BLOCK_SCORES = blockwise.attend, 1 << 28
    try:
        yield
    finally:
        flex.attend, memory.CPU_BLOCK_SCORES = kept


class Operations(TorchDispatchMode):
    """Counts floating point operations. torch's own counter follows modules, too, and then fails within a gradient."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        count = addmm_flop if packet is torch.ops.aten.addmm_ else flop_registry.get(packet)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Of the device: stated where it is known, else that of a matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        for known, flops in PEAK_FLOPS.items():
            if known in name:
                return flops
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best

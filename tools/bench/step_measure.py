"""Times one implementation of the training step in this process."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specbatch.drafts import memory
from specbatch.drafts.attention import cpu as cpu_attention
from specbatch.drafts.attention import gpu as gpu_attention
from tools.bench import block_case, plain_dflash, plain_eagle3, step_case
from tools.bench.prediction import predicted_bytes

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Vendors' peaks for dense bfloat16; on other devices a large matrix product is measured instead."""
TURN_S = 0.25
"""Least seconds of one turn, so that a GPU with steps of milliseconds is not measured while its clock rises."""
FIRST_FACTOR = {
    torch.ops.aten.mm: 0,
    torch.ops.aten.bmm: 0,
    torch.ops.aten.addmm: 1,
    torch.ops.aten.addmm_: 1,
    torch.ops.aten.baddbmm: 1,
}
"""Index of the first factor among the arguments of a matrix product."""


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """Time one implementation in this process."""
    stopwatch = Stopwatch(options)
    turns = [stopwatch.turn() for _ in range(options.repeat + 1)]
    return {**min(turns[1:] or turns, key=lambda turn: turn["seconds"]), **stopwatch.report()}


class Stopwatch:
    """Times one implementation of the step, with its data, turn by turn."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype or ("float32" if self.device.type == "cpu" else "bfloat16"))
        self.plain = options.only == "plain"
        of_blocks = options.algorithm == "dflash"
        self.kind = block_case if of_blocks else step_case
        self.plain_step = plain_dflash.plain_step if of_blocks else plain_eagle3.plain_step
        self.case = self.kind.make_case(options, self.device, self.dtype)
        self.cuda = self.device.type == "cuda"
        self.operations, self.loss = 0, float("nan")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = resident("VmRSS", reset=True)

    def turn(self) -> dict[str, float]:
        """Return seconds and processor seconds of a step: the mean of at least one, and of as many as fill `TURN_S`."""
        steps, begun, begun_cpu = 0, time.perf_counter(), time.process_time()
        # On a CPU, operations are counted in the first turn, whose time does not count if there are others.
        with contextlib.nullcontext() if self.operations or self.cuda else Operations() as counter:
            while not steps or (counter is None and time.perf_counter() - begun < TURN_S):
                self.loss = self._step()
                steps += 1
        if counter is not None:
            self.operations = counter.total
        seconds, cpu_s = time.perf_counter() - begun, time.process_time() - begun_cpu
        return {"seconds": seconds / steps, "cpu_s": cpu_s / steps}

    def report(self) -> dict[str, float | str]:
        """Return all measurements except times."""
        device = f"CPU, {torch.get_num_threads()} threads"
        peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else resident("VmHWM")
        if self.cuda:
            # Nothing is compiled while operations are counted, so that step is neither timed nor in the peak.
            with torch.compiler.set_stance("force_eager"), countable_attention(), Operations() as counter:
                self._step()
            self.operations = counter.total
            device = torch.cuda.get_device_name(self.device)
        return {
            "tokens": self.case.work.tokens,
            "loss_share": self.case.pack.loss_mask.float().mean().item(),
            "device": device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "loss": self.loss,
            "operations": self.operations,
            "peak_flops": peak_flops(self.device, self.dtype),
            "peak_bytes": peak - self.before,
            "predicted_bytes": predicted_bytes(self.case),
        }

    def _step(self) -> float:
        draft, pack, weights = self.case.draft, self.case.pack, self.case.weights
        draft.zero_grad()
        if self.plain:
            loss = self.plain_step(draft, pack, self.case.states, weights)
        else:
            loss = draft(pack, weights)[0].sum()
            loss.backward()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return loss.item()


def resident(kind: str, *, reset: bool = False) -> int:
    """Return the resident bytes of this process: ``VmRSS`` now, or ``VmHWM`` at most since the last reset (Linux).

    Preparing the step may take more memory for a while than the step itself, so the overall peak would hide the step's.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) << 10


@contextlib.contextmanager
def countable_attention() -> Iterator[None]:
    """Use the CPU's attention on a GPU, in large blocks: FlexAttention is one operation whose parts can't be
    counted."""
    kept = gpu_attention.attend, memory.CPU_BLOCK_SCORES
    gpu_attention.attend, memory.CPU_BLOCK_SCORES = cpu_attention.attend, 1 << 28
    try:
        yield
    finally:
        gpu_attention.attend, memory.CPU_BLOCK_SCORES = kept


class Operations(TorchDispatchMode):
    """Counts the floating point operations of matrix products, which are almost all.

    torch's own counter follows modules, too, and then fails within a gradient; and its formulas do not know all forms
    of a product (in torch 2.11 none with a given result dtype).
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = FIRST_FACTOR.get(func._overloadpacket)
        if first is not None:
            self.total += 2 * args[first].numel() * args[first + 1].shape[-1]
        return result


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak of the device: its vendor's figure if known, else that of a matrix product."""
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

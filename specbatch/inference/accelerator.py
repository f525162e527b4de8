"""Detects accelerators of this machine, and whether its CPU has bfloat16 instructions."""

from __future__ import annotations

import functools
import glob
import subprocess
import sys
from pathlib import Path

from specbatch.gpus import DEVICE_NODES

PLATFORM_VARIABLE, CPU_PLATFORM = "SGLANG_PLATFORM", "specbatch_cpu"
"""Environment variable and value that make SGLang use `specbatch.inference.platform`."""
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Linux's CPU flags for bfloat16: two of x86, one of Arm."""


@functools.cache
def accelerator_bytes() -> int:
    """Return the memory of the smallest accelerator that torch can use on this machine; 0 if there is none.

    A child process asks torch, so that it is not loaded here.
    """
    if not any(glob.glob(pattern) for pattern in DEVICE_NODES):
        return 0
    ask = (
        "import torch; a = torch.accelerator; "
        "print(min(torch.get_device_module().mem_get_info(i)[1] for i in range(a.device_count())) "
        "if a.is_available() else 0)"
    )
    asked = subprocess.run([sys.executable, "-c", ask], check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return int(asked.stdout) if asked.returncode == 0 else 0


def accelerator_available() -> bool:
    """Return whether torch can use an accelerator on this machine."""
    return accelerator_bytes() > 0


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 instructions; without them, bfloat16 is several times slower than
    float32."""
    cpuinfo = Path("/proc/cpuinfo")
    # If it is unknown, the checkpoint's dtype is kept.
    return not cpuinfo.is_file() or has_bfloat16(cpuinfo.read_text(encoding="utf-8"))


def has_bfloat16(cpuinfo: str) -> bool:
    """Return whether ``/proc/cpuinfo`` lists one of the flags."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return any(_BFLOAT16 & set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features"))

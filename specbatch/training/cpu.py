"""torchtitan on a machine without an accelerator. Import this before any other module of torchtitan.

torchtitan takes ``cuda`` where it finds no accelerator, and its modules copy `device_type` and `device_module`
from `torchtitan.tools.utils` by name, so they are set there before anything else is imported. With an
accelerator nothing is changed.
"""

from __future__ import annotations

import resource
import types

import torch
import torchtitan.tools.utils as titan

MEMORY_UNKNOWN = 1 << 34
"""Bytes of memory that torchtitan prints percentages of. Ranks share the host's memory, so no number is right."""


def _host() -> types.ModuleType:
    """Return a module with the functions of `torch.cuda` that torchtitan calls, for the host."""
    host = types.ModuleType("host")
    answers = {
        "set_device": torch.cpu.set_device,
        "device_count": torch.cpu.device_count,
        "synchronize": torch.cpu.synchronize,
        # torch.cpu returns a string, but barrier(device_ids=...) takes numbers.
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "cpu",
        "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=MEMORY_UNKNOWN),
        "memory_stats": lambda device=None: {
            "reserved_bytes.all.peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        },
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
    }
    host.__dict__.update(answers)
    return host


def local_device() -> torch.device:
    """Return the device of this rank."""
    return titan.get_local_device()


if not torch.accelerator.is_available():
    titan.device_type, titan.device_module = "cpu", _host()
    titan.get_local_device = lambda: torch.device("cpu")
    # The original looks for a GPU with lspci, and assumes an A100 if it finds none.
    titan.get_peak_flops = lambda name: 1e12

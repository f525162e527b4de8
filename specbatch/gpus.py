"""Finds the GPUs that a process may use, for each way in which sites and users assign them.

Whole-node sites set no variable at all; most others list all GPUs of the node for each of its tasks; with
``--gpus-per-task`` a task's list holds its own GPUs only. A list may hold numbers or UUIDs.
"""

from __future__ import annotations

import glob
import os
import socket
import subprocess
import sys
from collections.abc import MutableMapping, Sequence

from specbatch.errors import UserError

CUDA = "CUDA_VISIBLE_DEVICES"
ROCM = "ROCR_VISIBLE_DEVICES"
"""Variable that Slurm sets for AMD GPUs. HIP counts from 0 among the listed ones."""
_NONE = ("", "-1", "NoDevFiles")
DEVICE_NODES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD*", "/dev/davinci[0-9]*", "/dev/accel*")
_ASK = "import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)"


def count_accelerators() -> tuple[int, str]:
    """Return the number of accelerators that torch can use in this environment, and its message if there are none.

    A child process asks torch, so that it is not loaded here.
    """
    if not any(glob.glob(pattern) for pattern in DEVICE_NODES):
        return 0, "the node has no device file of a GPU"
    ran = subprocess.run([sys.executable, "-c", _ASK], check=False, capture_output=True, text=True, errors="replace")
    said = ran.stderr.strip().splitlines()
    words = ran.stdout.split()
    return (int(words[-1]) if words and not ran.returncode else 0), said[-1].strip() if said else ""


def listed_gpus(environment: MutableMapping[str, str] = os.environ) -> list[str] | None:
    """Return the GPUs that the environment lists; None if no variable restricts them."""
    if CUDA in environment:
        return [name.strip() for name in environment[CUDA].split(",") if name.strip() not in _NONE]
    if ROCM in environment:
        return [str(number) for number, name in enumerate(environment[ROCM].split(",")) if name.strip() not in _NONE]
    return None


def gpu_share(names: Sequence[str] | None, need: int, local: int, there: int) -> list[str]:
    """Return the GPUs of one task among the tasks of a node.

    Args:
        names: result of `listed_gpus`.
        need: GPUs of each task.
        local: number of the task on its node, from 0.
        there: number of GPUs of the node, which are shared out if ``names`` is None.

    Raises:
        UserError: there are too few.
    """
    if names is not None and len(names) == need:
        return list(names)
    shared = [str(number) for number in range(there)] if names is None else list(names)
    mine = shared[local * need : (local + 1) * need]
    if len(mine) == need:
        return mine
    given = (
        f"{CUDA} is not set and the node has {there}" if names is None else f"{CUDA} lists {','.join(names) or 'none'}"
    )
    raise UserError(
        f"{socket.gethostname()}: task {local} of the node needs {need} GPUs, but {given}; ask for {need} GPUs a task "
        "by gpus_per_node, slurm.gpus or slurm.extra, or leave the sharing to specbatch: no --gpus-per-task and no "
        "--gpu-bind"
    )


def take_gpus(need: int, local: int) -> None:
    """Restrict this process to its own GPUs, and check that torch can use them.

    Args:
        need: GPUs that this task was promised; at 0 nothing is changed.
        local: number of the task on its node.

    Raises:
        UserError: they are missing, or torch can't use them. Without this check, SGLang would serve on the CPU.
    """
    if not need:
        return
    names = listed_gpus()
    there, problem = count_accelerators() if names is None else (0, "")
    mine = ",".join(gpu_share(names, need, local, there))
    amd = ROCM in os.environ and CUDA not in os.environ
    os.environ["HIP_VISIBLE_DEVICES" if amd else CUDA] = mine
    usable, problem = (need, "") if names is None else count_accelerators()
    if usable < need:
        raise UserError(
            f"{socket.gethostname()}: this task was given the GPUs {mine} and needs {need}, but torch can use {usable}"
            f"{f' ({problem})' if problem else ''}; check nvidia-smi on that node, and that this Python's torch "
            "is built for its GPUs and driver"
        )

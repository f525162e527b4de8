"""Reports what torch says about this process's GPUs: ``python -m specbatch.doctor.gpu`` prints it as JSON.

It runs in a separate process, so that the caller does not occupy GPU memory.
"""

from __future__ import annotations

import subprocess
import sys

import msgspec

from specbatch.doctor.finding import Finding, failed
from specbatch.doctor.site import CheckTask
from specbatch.errors import RunError
from specbatch.gpus import take_gpus

SGLANG_LEAST = (7, 5)
"""The oldest compute capability that SGLang's kernels are built for."""
NOT_ASKED = "no GPU asked"


class Gpus(msgspec.Struct, frozen=True):
    """What torch says about the GPUs."""

    torch: str
    built_for: str
    """Version of CUDA or ROCm that torch was built for; empty for a CPU build."""
    architectures: tuple[str, ...]
    """Architectures that torch has kernels for, for example ``sm_90``."""
    names: tuple[str, ...]
    capabilities: tuple[tuple[int, int], ...]
    bytes: tuple[int, ...]


def usable(place: CheckTask) -> Finding:
    """Check that torch, and for engines SGLang, can use the GPUs of this task."""
    if not place.gpus_needed:
        return Finding("GPUs for torch", NOT_ASKED, verdict="not checked")
    take_gpus(place.gpus_needed, place.local)
    ran = subprocess.run(
        [sys.executable, "-m", __name__], capture_output=True, text=True, errors="replace", check=False
    )
    if ran.returncode:
        raise RunError(f"torch can't be asked: {ran.stderr.strip().splitlines()[-1:]}")
    return judge(place, msgspec.json.decode(ran.stdout.splitlines()[-1], type=Gpus))


def judge(place: CheckTask, gpus: Gpus) -> Finding:
    """Judge whether there are enough GPUs, of a kind with kernels. Pure."""
    what, need = "GPUs for torch", place.gpus_needed
    least = SGLANG_LEAST if place.component == "inference" else (0, 0)
    expected = f"{need} that torch {gpus.torch} has kernels for"
    if len(gpus.names) < need:
        return failed(
            what, f"torch {gpus.torch} can use {len(gpus.names)}", expected,
            "check nvidia-smi on that node: the driver may be older than torch's CUDA "
            f"{gpus.built_for or '(this build of torch has none)'}",
        )  # fmt: skip
    for name, capability in zip(gpus.names, gpus.capabilities, strict=True):
        if capability < least or not _has_kernels(capability, gpus.architectures):
            known = ", ".join(gpus.architectures)
            return failed(
                what, f"{name} of compute capability {capability[0]}.{capability[1]}", f"{expected}: {known}",
                f"use nodes with newer GPUs, or a torch that is built for these (slurm.{place.component}.python)",
            )  # fmt: skip
    each = (
        f"{gpus.names[0]}, {gpus.bytes[0] / (1 << 30):.0f} GiB, capability {'.'.join(map(str, gpus.capabilities[0]))}"
    )
    return Finding(what, f"{len(gpus.names)} x {each}; torch {gpus.torch}, CUDA {gpus.built_for}", expected)


def _has_kernels(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Return whether there are kernels of the same generation that are not newer, or code that the driver compiles."""
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        if kind not in ("sm", "compute") or not digits:
            return True  # ROCm's names have another form, and torch itself refuses GPUs without kernels
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def main() -> None:
    """The process."""
    import torch

    there = torch.cuda.is_available()
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if there else 0)]
    found = Gpus(
        torch.__version__,
        torch.version.cuda or getattr(torch.version, "hip", None) or "",
        tuple(torch.cuda.get_arch_list()) if there else (),
        tuple(gpu.name for gpu in every),
        tuple((gpu.major, gpu.minor) for gpu in every),
        tuple(gpu.total_memory for gpu in every),
    )
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()

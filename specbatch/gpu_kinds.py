"""GPUs by name: memory, and dense operations per second as their vendors state them.

Sources: NVIDIA's data sheets of A100, H100, H200, H20, L40S, B200 (HGX) and GB200 (NVL72, a GPU of 72), the figures
with sparsity halved.
"""

from __future__ import annotations

from dataclasses import dataclass

from specbatch.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    memory_mib: int
    """Memory that its driver reports."""
    capability: tuple[int, int]
    """Compute capability."""
    bf16_tflops: float
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    name: str = ""

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes."""
        return self.memory_mib << 20


GPUS = {
    "a100-40": Gpu(40960, (8, 0), 312, name="NVIDIA A100-SXM4-40GB"),
    "a100": Gpu(81920, (8, 0), 312, name="NVIDIA A100-SXM4-80GB"),
    "l40s": Gpu(46068, (8, 9), 362, 733, name="NVIDIA L40S"),
    "h20": Gpu(97871, (9, 0), 148, 296, name="NVIDIA H20"),
    "h100": Gpu(81559, (9, 0), 989, 1979, name="NVIDIA H100 80GB HBM3"),
    "h200": Gpu(143771, (9, 0), 989, 1979, name="NVIDIA H200"),
    "b200": Gpu(183359, (10, 0), 2250, 4500, 9000, name="NVIDIA B200"),
    "gb200": Gpu(189471, (10, 0), 2500, 5000, 10000, name="NVIDIA GB200"),
}


def gpu(name: str, key: str) -> Gpu:
    """Return the kind with this name.

    Args:
        key: configuration key or option that has the name, for the message.

    Raises:
        UserError: it is not in the table.
    """
    if name.lower() not in GPUS:
        raise UserError(f"{key}: {name} is not one of the GPUs that specbatch knows: {', '.join(GPUS)}; leave it out")
    return GPUS[name.lower()]

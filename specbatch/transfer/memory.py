"""Memory at an address: a view of it, and its hash."""

from __future__ import annotations

import ctypes
from typing import Any


def checksum(buffer: Any, seed: int) -> str:
    """Return the XXH3-128 hash of memory, in hexadecimal, without a copy.

    Args:
        buffer: a contiguous torch tensor of any dtype on the CPU, or an object with the buffer protocol.
        seed: a 64-bit number.

    Raises:
        ValueError: the tensor is not contiguous or not in host memory.
    """
    import xxhash

    if hasattr(buffer, "data_ptr"):
        if not buffer.is_contiguous() or buffer.device.type != "cpu":
            raise ValueError("checksums need contiguous tensors in host memory")
        buffer = memory(buffer.data_ptr(), buffer.nbytes)
    return str(xxhash.xxh3_128_hexdigest(buffer, seed=seed))


def memory(pointer: int, nbytes: int) -> memoryview:
    """Return a view of the bytes at an address; the caller keeps the memory alive."""
    if not nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(pointer)).cast("B")

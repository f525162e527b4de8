"""Whether this machine has something faster than its CPU."""

from __future__ import annotations

import functools
import glob
import subprocess
import sys

DEVICE_NODES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD*", "/dev/davinci[0-9]*", "/dev/accel*")


@functools.cache
def accelerator_available() -> bool:
    """Whether torch can use a GPU or the like on this machine; asked in a child, so that torch is not loaded here."""
    if not any(glob.glob(pattern) for pattern in DEVICE_NODES):
        return False
    ask = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    return subprocess.run([sys.executable, "-c", ask], check=False, stderr=subprocess.DEVNULL).returncode == 0

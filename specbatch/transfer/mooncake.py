"""The installed Mooncake: its binary and its Python module, or an error that says how to get them.

Nothing is imported before it is asked for, since `specbatch status` needs none of it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from specbatch.errors import UserError

PACKAGE = "mooncake-transfer-engine-non-cuda (without GPU) or mooncake-transfer-engine (with CUDA)"


def master_binary() -> Path:
    """The ``mooncake_master`` of the environment that this process runs in.

    Raises:
        UserError: if Mooncake or a system library that it needs is missing.
    """
    _need_libibverbs()
    spec = importlib.util.find_spec("mooncake")
    places = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in places:
        binary = folder / "mooncake_master"
        if binary.is_file():
            if not os.access(binary, os.X_OK):
                binary.chmod(binary.stat().st_mode | 0o111)
            return binary
    beside = Path(sys.executable).parent / "mooncake_master"
    if os.access(beside, os.X_OK):
        return beside
    raise UserError(f"mooncake_master is not installed for {sys.executable}: pip install {PACKAGE}")


def store_module() -> ModuleType:
    """``mooncake.store``.

    Raises:
        UserError: if Mooncake or a library that it needs is missing.
    """
    _need_libibverbs()
    try:
        import mooncake.store
    except ImportError as error:
        raise UserError(f"Mooncake cannot be loaded by {sys.executable} ({error}): pip install {PACKAGE}") from error
    return mooncake.store


def _need_libibverbs() -> None:
    """Mooncake links it even where only TCP is used."""
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError as error:
        raise UserError(
            f"Mooncake needs the system library libibverbs.so.1 ({error}): "
            "apt-get install libibverbs1, or dnf install libibverbs"
        ) from error

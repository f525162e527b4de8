"""Finds the installed Mooncake: its binary and its Python module, or an error that says how to install them.

Mooncake is imported only when it is needed: `specbatch status` works without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from specbatch.errors import UserError

NEEDED = "0.3.13"
"""The oldest version with every function that is used here."""
_USED = {
    "MooncakeDistributedStore": (
        "setup", "get_hostname", "register_buffer", "batch_put_from", "batch_get_into", "batch_remove",
        "remove_by_regex", "close",
    ),
    "ReplicateConfig": ("with_hard_pin", "preferred_segment"),
}  # fmt: skip
"""Classes of ``mooncake.store``, and the functions of each that are used."""
PACKAGE = "mooncake-transfer-engine-non-cuda (without GPU) or mooncake-transfer-engine (with CUDA)"


def master_binary() -> Path:
    """Return the ``mooncake_master`` of this process's Python environment.

    Raises:
        UserError: Mooncake or a system library that it needs is missing.
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
    """Return ``mooncake.store``, with every function that is used here.

    Raises:
        UserError: Mooncake or a library that it needs is missing, or too old.
    """
    _need_libibverbs()
    try:
        import mooncake.store
    except ImportError as error:
        raise UserError(f"Mooncake cannot be loaded by {sys.executable} ({error}): pip install {PACKAGE}") from error
    refuse_old(mooncake.store)
    return mooncake.store


def refuse_old(module: ModuleType) -> None:
    """Refuse a Mooncake that lacks functions that are used, before training starts.

    Raises:
        UserError: functions are missing; the message names them, the installed version and the required one.
    """
    missing = [
        f"{kind}.{name}"
        for kind, names in _USED.items()
        for name in names
        if not hasattr(getattr(module, kind, None), name)
    ]
    if missing:
        raise UserError(
            f"Mooncake {_version()} of {sys.executable} has no {', '.join(missing)}; {NEEDED} is the oldest "
            f"version that has: pip install --upgrade {PACKAGE}"
        )


def _version() -> str:
    for package in ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "of an unknown version"


def _need_libibverbs() -> None:
    """Check for libibverbs, which Mooncake links even if only TCP is used."""
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError as error:
        raise UserError(
            f"Mooncake needs the system library libibverbs.so.1 ({error}): "
            "apt-get install libibverbs1, or dnf install libibverbs"
        ) from error

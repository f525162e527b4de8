"""The provenance of a run: versions, revision, fingerprints."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import specbatch
from specbatch.timestamps import timestamp

PACKAGES = (
    "torch",
    "torchtitan",
    "sglang",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-non-cuda",
    "transformers",
    "datasets",
    "h5py",
    "submitit",
    "msgspec",
    "pyzmq",
)


def provenance(target: str, target_fingerprint: str, corpus_fingerprint: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Return everything that identifies a run for later readers.

    Args:
        target: path or name of the target model.
        plan: fingerprint of the plan.
    """
    return {
        "specbatch": specbatch.__version__,
        "git_revision": _git_revision(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "time": timestamp(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "target": target,
        "target_fingerprint": target_fingerprint,
        "corpus_fingerprint": corpus_fingerprint,
        "plan": plan,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Return the Git revision of the checkout with this code; None if it was installed from a package, or git is
    missing."""
    try:
        ran = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return ran.stdout.strip() or None

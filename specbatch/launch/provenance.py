"""What a run was made from: versions, revision, fingerprints."""

from __future__ import annotations

import datetime
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import specbatch

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
    """All that a later reader needs to say what this run was.

    Args:
        target: path or name of the target model.
        plan: the plan's fingerprint.
    """
    return {
        "specbatch": specbatch.__version__,
        "git_revision": _git_revision(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
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
    """Of the checkout that this code lies in; None where it was installed from a package, or git is missing."""
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

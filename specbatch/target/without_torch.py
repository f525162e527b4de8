"""Hides torch from transformers, for code that needs only its tokenizers and configurations.

transformers imports torch if it finds it, which takes many seconds on a login node.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec


def without_torch() -> None:
    """Hide torch from transformers in this process, if neither has been imported yet."""
    if {"torch", "transformers"} & sys.modules.keys():
        return
    find = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "torch" else find(name, package)

    importlib.util.find_spec = find_others
    # Suppress its message about this.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

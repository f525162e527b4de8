"""Hides torch from transformers, for code that needs only its tokenizers and configurations.

transformers imports torch if it finds it, which takes many seconds on a login node.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specbatch.config import Config


def without_torch(config: Config) -> None:
    """Hide torch from transformers in this process, if neither has been imported yet, unless the target's own code or
    its image processor may need it."""
    if config.target.trust_remote_code or config.data.images or {"torch", "transformers"} & sys.modules.keys():
        return
    find = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "torch" else find(name, package)

    importlib.util.find_spec = find_others
    # Suppress its message about this.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

"""Makes SGLang fork, not spawn, its processes on a machine without an accelerator.

Each spawned process imports SGLang again, which takes most of an engine's start there. A fork is safe, since the
starting process has neither a device in use nor threads yet.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

TARGET = "sglang.srt.entrypoints.engine._set_envs_and_config"


def register() -> None:
    """Make SGLang fork its scheduler and detokenizer."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, fork, HookType.AFTER)


def fork(result: None, server_args: Any) -> None:
    """Switch to fork, after SGLang has chosen to spawn."""
    multiprocessing.set_start_method("fork", force=True)

"""Skips the image processor of multimodal targets in engines that only receive token ids.

SGLang loads it even without a tokenizer, with libraries for images, and from files that the directory of a text model
need not have. Without it SGLang accepts only text, which is all that these engines receive.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

SELECT = "SPECBATCH_TEXT_ONLY"
"""Environment variable that is ``1`` if the server only receives token ids."""

TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_tokenizer_and_processor"


def register() -> None:
    """Have SGLang's front end take every target for one that reads text, if the environment says so."""
    if os.environ.get(SELECT) != "1":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, without_processor, HookType.AROUND)


def without_processor(original: Callable[[Any], None], manager: Any) -> None:
    """Set up the tokenizer and processor as SGLang does for a text model."""
    config = manager.model_config
    sees, config.is_multimodal = config.is_multimodal, False
    try:
        original(manager)
    finally:
        config.is_multimodal = sees

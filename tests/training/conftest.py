"""Fixtures for tests of training."""

from __future__ import annotations

import pytest
from torch.nn.attention import flex_attention


@pytest.fixture
def differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention refuses gradients on a CPU, where it has no kernel for them; as it is written down, it has them."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)

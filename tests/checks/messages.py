"""The message with which the checks refuse a configuration."""

from __future__ import annotations

import pytest

from specbatch.checks import check
from specbatch.config import Config
from specbatch.errors import UserError


def refused(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        check(config)
    return str(caught.value)

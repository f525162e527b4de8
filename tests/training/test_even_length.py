"""torchtitan refuses lengths that ranks can't share; packs of any length are shared all the same."""

from __future__ import annotations

import pytest

from specbatch.training.settings import even_length


@pytest.mark.parametrize(("tokens", "ranks", "length"), [(4097, 1, 4097), (4096, 2, 4096), (4098, 2, 4100), (1, 8, 16)])
def test_torchtitan_is_told_a_length_that_ranks_can_share(tokens: int, ranks: int, length: int) -> None:
    assert even_length(tokens, ranks) == length

"""Attention with sinks is the softmax over scores and the sink, of which the sink's part is left out."""

from __future__ import annotations

import pytest
import torch

from specbatch.inference import cpu_sinks


@pytest.mark.parametrize("masked", ["causal", "window", "each request its own"])
def test_a_sink_takes_part_in_the_softmax_and_adds_nothing(masked: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 5, 8, generator=generator)
    sinks = torch.randn(4, generator=generator)
    before = torch.ones(5, 5, dtype=torch.bool).tril()
    visible = {
        "causal": before,
        "window": before.triu(-2),
        "each request its own": before[None, None].repeat(2, 1, 1, 1),
    }
    if masked == "each request its own":
        visible[masked][1, :, :, 0] = False
        visible[masked][1, :, 0, 0] = True
    scores = query @ key.repeat_interleave(2, 1).mT * 0.5
    scores = torch.cat([scores.masked_fill(~visible[masked], -torch.inf), sinks[:, None, None].expand(2, 4, 5, 1)], -1)
    expected = scores.softmax(-1)[..., :-1] @ value.repeat_interleave(2, 1)

    def forward(query: torch.Tensor) -> torch.Tensor:
        mask = None if masked == "causal" else visible[masked]
        return cpu_sinks.attention(query, key, value, mask, masked == "causal", 0.5, enable_gqa=True)

    found = cpu_sinks._reading_sinks(forward)(query, sinks=sinks)
    torch.testing.assert_close(found, expected)
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, visible[masked], scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(cpu_sinks._reading_sinks(forward)(query), plain)

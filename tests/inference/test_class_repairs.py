"""Repairs of SGLang's classes compute the same as the kernels that they replace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from specbatch.inference.class_repairs import normed, repair, sums_of_squares, weigh_before
from specbatch.inference.text_only import without_processor


def test_queries_and_keys_are_normed_over_all_heads_of_all_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(3, 8, generator=generator), torch.randn(3, 4, generator=generator)
    scale = torch.rand(8, generator=generator), torch.rand(4, generator=generator)
    expected = [torch.nn.functional.rms_norm(x, x.shape[1:], w, 1e-6) for x, w in zip((query, key), scale, strict=True)]
    halves = [tuple(x[:, part] for x in (query, key)) for part in (slice(0, None, 2), slice(1, None, 2))]
    whole = sum(sums_of_squares(*half) for half in halves)
    assert isinstance(whole, torch.Tensor)
    for half, part in zip(halves, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        found = normed(*half, scale[0][part], scale[1][part], whole, tp_world=2, eps=1e-6)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs[:, part])


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: None = None


def test_an_expert_is_handed_states_times_their_weight() -> None:
    from dataclasses import dataclass

    @dataclass
    class Settings:
        apply_router_weight_on_input: bool

    def experts(layer: None, x: torch.Tensor, topk: TopK, config: Settings) -> torch.Tensor:
        assert not config.apply_router_weight_on_input
        return torch.tanh(x) * topk.topk_weights

    states, weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[0.2], [0.9]])
    topk = TopK(weights, torch.zeros(2, 1, dtype=torch.long))
    before = weigh_before(experts, None, states, topk, Settings(True))
    torch.testing.assert_close(before, torch.tanh(states * weights))
    torch.testing.assert_close(weigh_before(experts, None, states, topk, Settings(False)), torch.tanh(states) * weights)
    with pytest.raises(NotImplementedError, match="single expert"):
        weigh_before(experts, None, states, TopK(weights.repeat(1, 2), topk.topk_ids), Settings(True))


def test_mistral_3_hands_on_what_its_language_model_is_told() -> None:
    class Target:
        language_model = SimpleNamespace(set_eagle3_layers_to_capture=lambda ids: told.append(ids))

    told: list[list[int]] = []
    repair((Target, "Mistral3ForConditionalGeneration"), SimpleNamespace())
    Target().set_eagle3_layers_to_capture([1, 3])  # type: ignore[attr-defined]
    assert told == [[1, 3]]


def test_the_front_end_takes_a_target_that_sees_for_one_that_reads() -> None:
    seen: list[bool] = []
    manager = SimpleNamespace(model_config=SimpleNamespace(is_multimodal=True))
    without_processor(lambda manager: seen.append(manager.model_config.is_multimodal), manager)
    assert seen == [False]
    assert manager.model_config.is_multimodal

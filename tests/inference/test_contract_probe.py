"""A probe accepts right models and outputs, and rejects wrong ones; without SGLang."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specbatch.inference.contract_probe import LayerRecorder, Proof, Unprovable, decoder_layers, probe_of

HIDDEN, COUNT, ROWS = 32, 6, 8


@dataclass
class Pending:
    value: torch.Tensor
    update: Any = field(default_factory=lambda: SimpleNamespace(is_plain_add=True))


class Stream:
    """A layer like SGLang's: with the residual, and a contribution that lacks half of its sum."""

    def __init__(self) -> None:
        self.residual: torch.Tensor | None = None
        self.pending: Pending | None = None

    def export(self, hidden: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.pending is None:
            return hidden, None
        self.pending.value = self.pending.value * 2
        return self.pending.value, self.residual


class Owing(torch.nn.Module):
    """A layer that leaves the addition, and the sum over ranks, to the next one."""

    def forward(self, positions: Any, hidden_states: Any, forward_batch: Any, capture_output: Any = None) -> Any:
        stream = forward_batch.residual_stream
        if stream.pending is None:
            total = hidden_states
        else:
            halved = hidden_states is not stream.pending.value
            total = stream.residual + stream.pending.value * (2 if halved else 1)
        stream.residual, stream.pending = total, Pending(torch.tanh(total + positions) / 2)
        return object()


class Apart(torch.nn.Module):
    """A layer that is handed the residual as an argument."""

    def forward(self, hidden_states: Any, forward_batch: Any, residual: Any = None) -> Any:
        total = hidden_states if residual is None else hidden_states + residual
        return torch.tanh(total + 1), total


class LogitsProcessor(torch.nn.Module):
    final_logit_softcapping = 2.0
    logit_scale = 0.5

    def forward(self, input_ids: Any, hidden_states: torch.Tensor, lm_head: torch.nn.Linear) -> torch.Tensor:
        return 2 * torch.tanh(lm_head(hidden_states[-1:]) * 0.5 / 2)


class Model(torch.nn.Module):
    def __init__(self, kind: type[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(kind() for _ in range(COUNT))
        self.lm_head = torch.nn.Linear(HIDDEN, 50, bias=False)
        self.logits_processor = LogitsProcessor()

    @torch.no_grad()
    def forward(self, states: torch.Tensor) -> tuple[list[torch.Tensor], Any]:
        """The true outputs of all layers, and what SGLang's processor gives."""
        batch = SimpleNamespace(residual_stream=Stream() if isinstance(self.layers[0], Owing) else None)
        outputs, hidden, residual = [], states, None
        for index, layer in enumerate(self.layers):
            if isinstance(layer, Owing):
                hidden = layer(0.1 * index, hidden, batch)
                stream = batch.residual_stream
                outputs.append(stream.residual + 2 * stream.pending.value)
            else:
                hidden, residual = layer(hidden_states=hidden, forward_batch=batch, residual=residual)
                outputs.append(hidden + residual)
        last = outputs[-1] / 3
        return outputs, SimpleNamespace(
            next_token_logits=self.logits_processor(None, last, self.lm_head), last_hidden_states=last
        )


LAYERS = (0, 2, 4)
PROBE = slice(3, 3 + ROWS)


def run(kind: type[torch.nn.Module]) -> tuple[LayerRecorder, list[torch.Tensor], Any]:
    torch.manual_seed(0)
    model, states = Model(kind), torch.randn(3 + ROWS, HIDDEN)
    watch = LayerRecorder(model, COUNT)
    with watch:
        outputs, output = model(states)
    output.hidden_states = torch.cat([outputs[layer] for layer in LAYERS], dim=1)
    return watch, outputs, output


@pytest.mark.parametrize("kind", [Owing, Apart])
def test_outputs_of_layers_are_taken_for_what_they_are(kind: type[torch.nn.Module]) -> None:
    watch, outputs, output = run(kind)
    for layer in LAYERS:
        torch.testing.assert_close(watch.outputs[layer], outputs[layer])
    proof = Proof(LAYERS, "Some")
    assert proof.hooked(watch, output, PROBE) is None
    assert proof.plain(output, PROBE) is None
    assert not any(layer._forward_pre_hooks for layer in watch.model.modules()), "all hooks are gone"


@pytest.mark.parametrize("kind", [Owing, Apart])
def test_another_layer_s_output_is_named(kind: type[torch.nn.Module]) -> None:
    watch, outputs, output = run(kind)
    output.hidden_states = torch.cat([outputs[layer] for layer in (0, 4, 4)], dim=1)
    why = Proof(LAYERS, "Some").hooked(watch, output, PROBE)
    assert why is not None
    assert "Some does not provide what layer 2 passes to layer 3" in why
    assert "it is the output of layer 4" in why


def test_a_contribution_without_the_residual_stream_is_no_output() -> None:
    watch, outputs, output = run(Apart)
    output.hidden_states = torch.cat([torch.tanh(outputs[max(0, layer - 1)] + 1) for layer in LAYERS], dim=1)
    assert "layer 0 passes to layer 1" in str(Proof(LAYERS, "Some").hooked(watch, output, PROBE))


def test_states_that_the_head_is_not_multiplied_with_are_refused() -> None:
    watch, _, output = run(Apart)
    output.last_hidden_states = output.last_hidden_states * 1.1
    assert "their logits differ from the engine's by" in str(Proof(LAYERS, "Some").hooked(watch, output, PROBE))


def test_graphs_that_capture_something_else_are_refused() -> None:
    watch, _, output = run(Apart)
    proof = Proof(LAYERS, "Some")
    assert proof.hooked(watch, output, PROBE) is None
    output.hidden_states = torch.nn.functional.normalize(output.hidden_states, dim=1)
    assert "disable_prefill_cuda_graph" in str(proof.plain(output, PROBE))


def test_what_is_not_simply_added_can_not_be_proved() -> None:
    model = Model(Owing)
    batch = SimpleNamespace(residual_stream=Stream())
    batch.residual_stream.residual = torch.ones(ROWS, HIDDEN)
    batch.residual_stream.pending = Pending(torch.ones(ROWS, HIDDEN), SimpleNamespace(is_plain_add=False))
    watch = LayerRecorder(model, COUNT)
    with watch:
        model.layers[1](0.0, object(), batch)
    assert "does not simply add" in str(Proof(LAYERS, "Some").hooked(watch, None, PROBE))


def test_a_model_without_its_layers_can_not_be_watched() -> None:
    with pytest.raises(Unprovable, match="no list of its 5 decoder layers"):
        decoder_layers(Model(Apart), 5)


def test_a_probe_s_rows_are_found_among_others() -> None:
    def batch(*names: str) -> Any:
        return SimpleNamespace(reqs=[SimpleNamespace(rid=name) for name in names], extend_lens=[3, ROWS][: len(names)])

    assert probe_of(batch("HEALTH_CHECK_1", "specbatch--1-1")) == (1, PROBE)
    assert probe_of(batch("specbatch-1-1", "specbatch-11-0")) is None

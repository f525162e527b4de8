"""Translation of a configuration to torchtitan's: parameter groups and learning rates, by torchtitan's own classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specbatch.config import Config, Data, Run, Target, Training
from specbatch.drafts.base import algorithm_of
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.export import export
from specbatch.target import read_target
from specbatch.training import cpu
from tests.test_export import make_run

from torchtitan.components.optimizer import OptimizersContainer  # isort: skip

from specbatch.training.model import model_spec  # isort: skip
from specbatch.training.settings import optimizer, schedule  # isort: skip

STEPS = 20


class CountedCorpus:
    """The part of a corpus that the model's shape needs."""

    tokenizer_size = 512
    loss_token_counts = np.arange(512)


@pytest.fixture
def config(tiny_target: Path) -> Config:
    return Config(
        run=Run(dir="run"),
        target=Target(path=str(tiny_target)),
        data=Data(train=["conversations.jsonl"]),
        draft=Eagle3Draft(ttt_steps=2, vocab_size=100),
        training=Training(weight_decay=0.25, learning_rate=1.0, warmup_steps=4),
    )


def built(config: Config) -> tuple[torch.nn.Module, OptimizersContainer]:
    """The draft on a CPU, and torchtitan's optimizer for it."""
    assert cpu.local_device().type == "cpu"
    spec = model_spec(config, algorithm_of(config, read_target(config.target.path)), CountedCorpus())
    model = spec.model.build()
    model.init_states()
    return model, optimizer(config, spec, gpu=False).build(model_parts=[model])


def decays(model: torch.nn.Module, container: OptimizersContainer) -> dict[str, float]:
    """Weight decay of each parameter that is optimized."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"]
        for part in container.optimizers
        for group in part.param_groups
        for parameter in group["params"]
    }


def test_matrices_decay_and_nothing_else_does(config: Config) -> None:
    model, container = built(config)
    assert decays(model, container) == {
        name: 0.25 if parameter.ndim == 2 else 0.0 for name, parameter in model.named_parameters()
    }


def test_a_frozen_head_is_not_optimized_and_a_trained_embedding_is(config: Config) -> None:
    config.draft = replace(config.draft, train_head=False, train_embedding=True)
    model, container = built(config)
    optimized = decays(model, container)
    assert "lm_head.weight" not in optimized
    assert optimized["embed_tokens.weight"] == 0.25
    assert model.embed_tokens.weight.shape == (512, 64)
    assert torch.equal(model.lm_head.weight, model.target_head.float())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_draft_that_is_there_already_is_where_training_begins(config: Config, tiny_target: Path, tmp_path: Path):
    folder = export(make_run(tmp_path, tiny_target))
    config.draft = replace(config.draft, init_from=str(folder), intermediate_size=96)
    algorithm = algorithm_of(config, read_target(tiny_target))
    spec = model_spec(config, algorithm, CountedCorpus(), algorithm.files.read_published())
    model = spec.model.build()
    model.init_states()
    stored, rows = load_file(folder / "model.safetensors"), model.draft_ids.tolist()
    for name, parameter in model.named_parameters():
        if name != "lm_head.weight":
            assert torch.equal(parameter, stored[name].float()), name
    old_ids = (torch.arange(100) + stored["d2t"]).tolist()
    both = [(rows.index(token), old_ids.index(token)) for token in set(rows) & set(old_ids)]
    assert 0 < len(both) < 100
    for new, old in both:
        assert torch.equal(model.lm_head.weight[new], stored["lm_head.weight"][old].float())


def rates(config: Config) -> list[float]:
    """The learning rate of each step."""
    _, container = built(config)
    scheduler = schedule(config).build(optimizers=container, training_steps=STEPS)
    found = []
    for _ in range(STEPS):
        found.append(scheduler.schedulers[0].get_last_lr()[0])
        container.step()
        scheduler.step()
    return found


WARM = [0.25, 0.5, 0.75, 1.0]


def test_wsd_stays_and_falls_at_the_end(config: Config) -> None:
    config.training = replace(config.training, schedule="wsd", decay_share=0.25, min_learning_rate=0.5)
    # torchtitan ends a fall one step after the last.
    assert rates(config) == pytest.approx(WARM + [1.0] * 12 + [0.9, 0.8, 0.7, 0.6])


def test_constant_stays(config: Config) -> None:
    config.training = replace(config.training, schedule="constant")
    assert rates(config) == pytest.approx(WARM + [1.0] * 16)


def test_linear_falls_from_the_warm_up_on(config: Config) -> None:
    config.training = replace(config.training, schedule="linear")
    assert rates(config) == pytest.approx(WARM + [1 - step / 16 for step in range(16)])

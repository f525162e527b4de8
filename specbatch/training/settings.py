"""Translates a run's configuration to torchtitan's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config.configs import CommConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.protocols.model_spec import ModelSpec

from specbatch.config import Config
from specbatch.rundir import RunDir
from specbatch.snapshot.manager import HDF5CheckpointManager
from specbatch.training.feed.dataloader import PackLoader
from specbatch.training.feed.steps import Steps
from specbatch.training.metrics import DraftLoss, StepMetrics
from specbatch.training.trainer import DraftTrainer

if TYPE_CHECKING:
    from specbatch.corpus import Corpus


class NoTokenizer(BaseTokenizer):
    """The tokenizer that torchtitan requires. The corpus is already tokenized, so using it is a defect."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **unused: Any) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise AssertionError(self.__doc__)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise AssertionError(self.__doc__)

    def get_vocab_size(self) -> int:
        raise AssertionError(self.__doc__)


def trainer_config(
    config: Config,
    run_dir: RunDir,
    spec: ModelSpec,
    steps: Steps,
    corpus: Corpus,
    *,
    last_step: int,
    facts: dict[str, Any],
) -> DraftTrainer.Config:
    """Return the configuration of torchtitan's trainer.

    Args:
        last_step: the run's number of steps.
        facts: must equal those of the snapshot that training continues from.
    """
    training, gpu = config.training, torch.accelerator.is_available()
    # A rank may be in a collective while another waits for data: the head, not the network, decides what is too long.
    patience_s = int(config.run.stall_timeout_s) + 60
    return DraftTrainer.Config(
        model_spec=spec,
        dump_folder=str(run_dir.root),
        tokenizer=NoTokenizer.Config(),
        dataloader=PackLoader.Config(steps=steps, corpus=corpus),
        loss=DraftLoss.Config(),
        metrics=StepMetrics.Config(disable_color_printing=True),
        optimizer=optimizer(config, spec, gpu=gpu),
        lr_scheduler=schedule(config),
        training=TrainingConfig(
            local_batch_size=1,
            global_batch_size=training.packs_per_step,
            seq_len=even_length(training.tokens_per_pack, training.context_parallel),
            steps=last_step,
            max_norm=training.max_grad_norm,
            mixed_precision_param=training.dtype,
            disable_cuda_graphs=True,
        ),
        # The default, spmd_types, has no mesh named `fsdp`.
        parallelism=ParallelismConfig(
            spmd_backend="partial_dtensor", context_parallel_degree=training.context_parallel
        ),
        activation_checkpoint=None,
        comm=CommConfig(
            init_timeout_seconds=patience_s,
            train_timeout_seconds=patience_s,
            # Otherwise a folder for a flight recorder is created in the run directory.
            trace_buf_size=0,
        ),
        debug=DebugConfig(seed=config.run.seed, enable_structured_logging=False),
        checkpoint=HDF5CheckpointManager.Config(
            enable=True, interval=config.snapshot.interval.steps or 1, keep=config.snapshot.keep, facts=facts
        ),
    )


def even_length(tokens: int, ranks: int) -> int:
    """Return the least length from ``tokens`` on that torchtitan lets ``ranks`` share; it has no effect on results.

    Packs are shared by their live columns, whatever their length.
    """
    each = 2 * ranks if ranks > 1 else 1
    return -(-tokens // each) * each


def optimizer(config: Config, spec: ModelSpec, *, gpu: bool) -> OptimizersContainer.Config:
    """Return the configuration of AdamW, with weight decay on matrices only."""
    training = config.training
    assert spec.model is not None
    with torch.device("meta"):
        parameters = dict(spec.model.build().named_parameters())

    def parameters_of(dimensions: int) -> list[str]:
        return [name for name, parameter in parameters.items() if (1 if parameter.ndim < 2 else 2) == dimensions]

    shared = {"lr": training.learning_rate, "betas": tuple(training.betas)}
    groups = []
    # torchtitan rejects groups without parameters.
    for decay, chosen in ((0.0, parameters_of(1)), (training.weight_decay, parameters_of(2))):
        if chosen:
            pattern = f"^({'|'.join(map(re.escape, chosen))})$"
            kwargs = {**shared, "weight_decay": decay}
            groups.append(ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=kwargs))
    return OptimizersContainer.Config(
        param_groups=groups,
        implementation="fused" if gpu else "foreach",
    )


def schedule(config: Config) -> LRSchedulersContainer.Config:
    """Return the learning-rate schedule: warm-up, cut at the last step, and then as configured until the last step."""
    training = config.training
    share = {"constant": 0.0, "wsd": training.decay_share}.get(training.schedule)
    return LRSchedulersContainer.Config(
        warmup_steps=training.warmup_steps,
        decay_ratio=share,
        decay_type="cosine" if training.schedule == "cosine" else "linear",
        min_lr_factor=training.min_learning_rate,
    )

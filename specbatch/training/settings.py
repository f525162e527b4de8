"""From a run's configuration to torchtitan's."""

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
from specbatch.training.dataloader import PackLoader
from specbatch.training.metrics import StepMetrics, UnrolledLoss
from specbatch.training.steps import Steps
from specbatch.training.trainer import DraftTrainer

if TYPE_CHECKING:
    from specbatch.corpus import Corpus


class NoTokenizer(BaseTokenizer):
    """torchtitan wants one; the corpus is tokenized already, so whoever asks it is wrong."""

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
    """What torchtitan trains with.

    Args:
        last_step: the run's number of steps.
        facts: what a snapshot must have been made with to go on from it.
    """
    training, gpu = config.training, torch.accelerator.is_available()
    # A rank may stand in a collective while another waits for data; that is the head's to watch, not the network's.
    patience_s = int(config.run.stall_timeout_s) + 60
    return DraftTrainer.Config(
        model_spec=spec,
        dump_folder=str(run_dir.root),
        tokenizer=NoTokenizer.Config(),
        dataloader=PackLoader.Config(steps=steps, corpus=corpus),
        loss=UnrolledLoss.Config(),
        metrics=StepMetrics.Config(disable_color_printing=True),
        optimizer=optimizer(config, spec, gpu=gpu),
        lr_scheduler=schedule(config),
        training=TrainingConfig(
            local_batch_size=1,
            global_batch_size=training.packs_per_step,
            seq_len=training.tokens_per_pack,
            steps=last_step,
            max_norm=training.max_grad_norm,
            mixed_precision_param=training.dtype,
            disable_cuda_graphs=True,
        ),
        # spmd_types, the default, names no mesh `fsdp`.
        parallelism=ParallelismConfig(
            spmd_backend="partial_dtensor", context_parallel_degree=training.context_parallel
        ),
        activation_checkpoint=None,
        comm=CommConfig(
            init_timeout_seconds=patience_s,
            train_timeout_seconds=patience_s,
            # Else a folder for a flight recorder is made in the run directory.
            trace_buf_size=0,
        ),
        debug=DebugConfig(seed=config.run.seed, enable_structured_logging=False),
        checkpoint=HDF5CheckpointManager.Config(
            enable=True, interval=config.snapshot.interval.steps or 1, keep=config.snapshot.keep, facts=facts
        ),
    )


def optimizer(config: Config, spec: ModelSpec, *, gpu: bool) -> OptimizersContainer.Config:
    """AdamW; what is no matrix does not decay."""
    training = config.training
    assert spec.model is not None
    with torch.device("meta"):
        parameters = dict(spec.model.build().named_parameters())
    vectors = "|".join(re.escape(name) for name, parameter in parameters.items() if parameter.ndim < 2)
    shared = {"lr": training.learning_rate, "betas": tuple(training.betas)}
    return OptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(
                pattern=f"^({vectors})$", optimizer_name="AdamW", optimizer_kwargs={**shared, "weight_decay": 0.0}
            ),
            ParamGroupConfig(
                pattern=".*", optimizer_name="AdamW", optimizer_kwargs={**shared, "weight_decay": training.weight_decay}
            ),
        ],
        implementation="fused" if gpu else "foreach",
    )


def schedule(config: Config) -> LRSchedulersContainer.Config:
    """Warm-up, and then as configured until the last step. The warm-up of a shorter run is cut there."""
    training = config.training
    share = {"constant": 0.0, "wsd": training.decay_share}.get(training.schedule)
    return LRSchedulersContainer.Config(
        warmup_steps=training.warmup_steps,
        decay_ratio=share,
        decay_type="cosine" if training.schedule == "cosine" else "linear",
        min_lr_factor=training.min_learning_rate,
    )

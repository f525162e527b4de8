"""The draft as torchtitan's model: built on meta, sharded, then made from a seed.

State dictionary, names and shapes are the draft's own; only the interface is torchtitan's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec

from specbatch.config import Config
from specbatch.drafts.base import Algorithm
from specbatch.target import TargetShape, embedding, head_bias, lm_head

if TYPE_CHECKING:
    from specbatch.corpus import Corpus


@dataclass(frozen=True)
class Start:
    """Where a draft's first weights come from."""

    algorithm: Algorithm
    target: TargetShape
    """The target that embedding and head are read from."""
    seed: int
    draft: Any
    """A published draft whose weights are used if no snapshot is loaded; None if there is none."""


@cache
def draft_model(draft: type[torch.nn.Module]) -> type[BaseModel]:
    """Return a draft algorithm's module as a class with torchtitan's model protocol, under the module's own names."""

    class DraftModel(draft, BaseModel):  # type: ignore[valid-type, misc]
        @dataclass(kw_only=True, slots=True)
        class Config(BaseModel.Config):
            draft: Any
            """The configuration that the module is built from."""
            start: Start

            def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
                """Do nothing: the configuration is complete."""

            def get_nparams_and_flops(self, model: torch.nn.Module, seq_len: int) -> tuple[int, int]:
                """Return parameters, and operations per token if each were used once; torchtitan only prints them."""
                count = sum(parameter.numel() for parameter in model.parameters())
                return count, 6 * count

            def to_dict(self) -> dict[str, Any]:
                start = self.start
                return {"algorithm": start.algorithm.name, "target": str(start.target.path), "seed": start.seed}

        def __init__(self, config: Config) -> None:
            super().__init__(config.draft)
            self._start, self._settings = config.start, config.draft

        def verify_module_protocol(self) -> None:
            """Accept plain modules of torch: nothing here is tensor parallel."""

        def init_states(self, *, buffer_device: torch.device | None = None) -> None:
            """Initialize the weights, and attach what is read from the target."""
            start, tensors = self._start, None
            head = lm_head(start.target)
            if start.draft is not None:
                tensors = start.algorithm.files.starting_tensors(start.draft, self._settings, head)
            self.initialize(start.seed, embedding(start.target), head, tensors, head_bias(start.target))

    return DraftModel


def parallelize(
    model: torch.nn.Module, *, parallel_dims: ParallelDims, training: Any, **unused: Any
) -> torch.nn.Module:
    """Shard the draft over all ranks as one unit. Gradients are summed, not averaged: the losses are means already."""
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        cast_forward_inputs=False,
    )
    if parallel_dims.cp_enabled:
        # Meshes fold it into `fsdp`: only the loss treats ranks that share packs differently.
        model.group = parallel_dims.get_mesh("cp").get_group()
    fully_shard(model, mesh=parallel_dims.get_mesh(names), mp_policy=policy)
    disable_fsdp_gradient_division(model)
    # Without this, the undivided gradient is reduced with PREMUL_SUM, which gloo lacks.
    model.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "evaluate")
    return model


def model_spec(config: Config, algorithm: Algorithm, corpus: Corpus, start: Any = None) -> ModelSpec:
    """Return the specification that torchtitan builds the draft from.

    Args:
        start: a draft whose weights are used if no snapshot is loaded.
    """
    model: Any = draft_model(algorithm.module())
    target = algorithm.target
    return ModelSpec(
        name=algorithm.name,
        flavor=target.path.name,
        model=model.Config(draft=algorithm.settings(corpus), start=Start(algorithm, target, config.run.seed, start)),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )

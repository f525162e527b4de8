"""The draft as torchtitan's model: built on meta, sharded, then made from a seed.

State dictionary, names and shapes are the draft's own. Only the outside is torchtitan's.
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
from specbatch.target import TargetShape, embedding, lm_head
from specbatch.training.drafts import files, training

if TYPE_CHECKING:
    from specbatch.corpus import Corpus
    from specbatch.training.drafts.published import Published


@dataclass(frozen=True)
class Start:
    """How a draft begins."""

    algorithm: str
    target: TargetShape
    """Where embedding and head are read from."""
    seed: int
    draft: Published | None
    """One whose weights are taken, where no snapshot is loaded."""


@cache
def draft_model(draft: type[torch.nn.Module]) -> type[BaseModel]:
    """A draft algorithm's module with the protocol that torchtitan asks of a model, and the module's own names."""

    class DraftModel(draft, BaseModel):  # type: ignore[valid-type, misc]
        @dataclass(kw_only=True, slots=True)
        class Config(BaseModel.Config):
            draft: Any
            """What the module is made from."""
            start: Start

            def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
                """Everything is known already."""

            def get_nparams_and_flops(self, model: torch.nn.Module, seq_len: int) -> tuple[int, int]:
                """Parameters, and floating point operations a token if every column were live."""
                count = sum(parameter.numel() for parameter in model.parameters())
                return count, 6 * count * self.draft.ttt_steps

            def to_dict(self) -> dict[str, Any]:
                start = self.start
                return {"algorithm": start.algorithm, "target": str(start.target.path), "seed": start.seed}

        def __init__(self, config: Config) -> None:
            super().__init__(config.draft)
            self._start, self._draft_ids = config.start, config.draft.draft_ids

        def verify_module_protocol(self) -> None:
            """Plain modules of torch are fine: nothing here is tensor parallel."""

        def init_states(self, *, buffer_device: torch.device | None = None) -> None:
            """Make the first weights, and attach what is read of the target."""
            start, tensors = self._start, None
            head = lm_head(start.target)
            if start.draft is not None:
                tensors = files(start.algorithm).starting_tensors(start.draft, self._draft_ids, head)
            self.initialize(start.seed, embedding(start.target), head, tensors)

    return DraftModel


def parallelize(
    model: torch.nn.Module, *, parallel_dims: ParallelDims, training: Any, **unused: Any
) -> torch.nn.Module:
    """Shard the draft over all ranks as one unit. Gradients are plain sums: the losses are means already."""
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        cast_forward_inputs=False,
    )
    if parallel_dims.cp_enabled:
        # Meshes fold it into `fsdp`: ranks that share packs are ranks like all others, but for the loss.
        model.group = parallel_dims.get_mesh("cp").get_group()
    fully_shard(model, mesh=parallel_dims.get_mesh(names), mp_policy=policy)
    disable_fsdp_gradient_division(model)
    # Else the undivided gradient is reduced with PREMUL_SUM, which gloo does not have.
    model.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "evaluate")
    return model


def model_spec(config: Config, target: TargetShape, corpus: Corpus, start: Published | None = None) -> ModelSpec:
    """What torchtitan builds the draft from.

    Args:
        start: a draft whose weights are taken, where no snapshot is loaded.
    """
    name = config.draft.algorithm
    algorithm = training(name)
    model: Any = draft_model(algorithm.Draft)
    return ModelSpec(
        name=name,
        flavor=target.path.name,
        model=model.Config(
            draft=algorithm.settings(config, target, corpus), start=Start(name, target, config.run.seed, start)
        ),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )

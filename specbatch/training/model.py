"""The draft as torchtitan's model: built on meta, sharded, then made from a seed.

State dictionary, names and shapes are the draft's own. Only the outside is torchtitan's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec

from specbatch.config import Config
from specbatch.corpus import draft_vocabulary
from specbatch.target import TargetShape, capture_contract, embedding, lm_head
from specbatch.training.drafts.eagle3 import Eagle3, Eagle3Config, Recompute
from specbatch.training.drafts.published import Published, starting_tensors
from specbatch.training.drafts.rope import Rope
from specbatch.training.memory import default_columns_at_once

if TYPE_CHECKING:
    from specbatch.corpus import Corpus


class DraftModel(Eagle3, BaseModel):
    """EAGLE-3 with the protocol that torchtitan asks of a model."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        draft: Eagle3Config
        target: TargetShape
        """Where embedding and head are read from."""
        seed: int
        columns_at_once: int
        recompute: Recompute
        start: Published | None = None
        """A draft whose weights are taken, where training begins."""

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Everything is known already."""

        def get_nparams_and_flops(self, model: torch.nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and floating point operations a token if every column were live."""
            count = sum(parameter.numel() for parameter in model.parameters())
            return count, 6 * count * self.draft.ttt_steps

        def to_dict(self) -> dict[str, Any]:
            return {"algorithm": "eagle3", "target": str(self.target.path), "seed": self.seed}

    def __init__(self, config: Config) -> None:
        super().__init__(config.draft)
        self._target, self._seed, self._start = config.target, config.seed, config.start
        self.columns_at_once, self.recompute = config.columns_at_once, config.recompute

    def verify_module_protocol(self) -> None:
        """Plain modules of torch are fine: nothing here is tensor parallel."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Make the first weights, and attach what is read of the target."""
        head = lm_head(self._target)
        start = starting_tensors(self._start, self.config.draft_ids, head) if self._start else None
        self.initialize(self._seed, embedding(self._target), head, start)


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
    return ModelSpec(
        name=config.draft.algorithm,
        flavor=target.path.name,
        model=DraftModel.Config(
            draft=eagle3_config(config, target, corpus),
            target=target,
            seed=config.run.seed,
            columns_at_once=config.training.columns_at_once
            or default_columns_at_once(gpu=torch.accelerator.is_available()),
            recompute=Recompute(config.training.recompute),
            start=start,
        ),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )


def eagle3_config(config: Config, target: TargetShape, corpus: Corpus) -> Eagle3Config:
    """The draft's shape: the target's, but for depth, vocabulary and, if wished, the MLP's width."""
    scaling = target.rope["rope_scaling"] or {}
    rope = Rope(target.head_dim, target.rope["rope_theta"], target.max_positions, tuple(scaling.items()))
    return Eagle3Config(
        hidden_size=target.hidden,
        intermediate_size=config.draft.intermediate_size or target.intermediate,
        num_attention_heads=target.heads,
        num_key_value_heads=target.kv_heads,
        head_dim=target.head_dim,
        rms_norm_eps=target.rms_norm_eps,
        rope=rope,
        ttt_steps=config.draft.ttt_steps,
        draft_ids=_draft_ids(config, target, corpus),
        contract=capture_contract(config, target),
        train_head=config.draft.train_head,
        embedding_rows=target.vocab if config.draft.train_embedding else 0,
    )


def _draft_ids(config: Config, target: TargetShape, corpus: Corpus) -> tuple[int, ...]:
    """Target ids of the draft's vocabulary, ascending."""
    size = config.draft.vocab_size
    if size is None or size >= target.vocab:
        return tuple(range(target.vocab))
    size = min(size, corpus.tokenizer_size)
    return tuple(draft_vocabulary(corpus.loss_token_counts, size, corpus.tokenizer_size).tolist())

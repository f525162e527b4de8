"""bfloat16 to compute in; float32 weights, gradients that are reduced and added up in float32, float32 rotations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from specbatch.drafts.eagle3.model import Eagle3Module
from specbatch.drafts.fused import rotate
from specbatch.drafts.rope import Rope
from tests.drafts.eagle3.test_model import WHOLE, make_draft, pack_of
from tests.drafts.samples import WEIGHTS, Sample

STEPS, RANKS, PACKS = 3, 2, 2


def _pack(rank: int, number: int):
    pack = pack_of([Sample([False] * 5 + [True] * 20, seed=10 * rank + number)])
    pack.rows["aux"], pack.rows["last"] = pack.rows["aux"].bfloat16(), pack.rows["last"].bfloat16()
    return pack


def _draft(dtype: torch.dtype) -> Eagle3Module:
    """A draft with these weights, rounded to bfloat16 first, and a target in bfloat16."""
    draft = make_draft(STEPS, WHOLE).bfloat16().to(dtype)
    draft.embedding, draft.target_head = draft.embedding.bfloat16(), draft.target_head.bfloat16()
    return draft


def _train(draft: torch.nn.Module, rank: int, number: int) -> None:
    draft(_pack(rank, number), WEIGHTS[:STEPS].float())[0].sum().backward()


def _rank(rank: int, folder: str) -> None:
    """Train two packs on each rank, sharded; and for each pack alone, plainly in bfloat16. Keep both gradients."""
    from specbatch.training import cpu  # isort: skip  # noqa: F401  # before any other module of torchtitan
    from torchtitan.config.configs import ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims

    from specbatch.training.model import parallelize

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    alone = []
    for number in range(PACKS):
        plain = _draft(torch.bfloat16)
        _train(plain, rank, number)
        alone.append({name: parameter.grad for name, parameter in plain.named_parameters()})
    draft = _draft(torch.float32)
    dims = ParallelDims.from_config(ParallelismConfig(spmd_backend="partial_dtensor"), RANKS)
    parallelize(draft, parallel_dims=dims, training=TrainingConfig(mixed_precision_param="bfloat16"))
    computed_in = set()
    draft.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: computed_in.add(inputs[0].dtype))
    for number in range(PACKS):
        _train(draft, rank, number)
    sharded = {name: parameter.grad.full_tensor() for name, parameter in draft.named_parameters()}
    weights = {parameter.dtype for parameter in draft.parameters()}
    torch.save((alone, sharded, computed_in, weights), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.light
def test_gradients_of_packs_and_ranks_are_added_up_in_float32(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(RANKS)]
    _, sharded, computed_in, weights = ranks[0]
    assert computed_in == {torch.bfloat16}
    assert weights == {torch.float32}
    for name, gradient in sharded.items():
        parts: list[Tensor] = [pack[name].float() for alone, *_ in ranks for pack in alone]
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, torch.stack(parts).sum(0), rtol=1e-5, atol=1e-7)
        # In bfloat16 the sum would be another one.
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_rotations_of_bfloat16_vectors_at_far_positions_lose_no_more_than_the_last_rounding() -> None:
    rope, position = Rope(64, 1e5, 1 << 17), torch.arange(100_000, 100_200)
    x = torch.randn(200, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = rotate(x.double(), *rope.rotation(position, torch.float64))
    ours = rotate(x, *rope.rotation(position, torch.float32))
    coarse = rotate.eager(x, *rope.rotation(position, torch.bfloat16))

    def only_rounded(found: Tensor) -> bool:
        return bool(((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all())

    assert only_rounded(ours)
    assert not only_rounded(coarse)

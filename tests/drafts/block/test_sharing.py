"""A pack that several ranks train together: all of them together do what one would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from specbatch.drafts.block.anchors import Draw
from specbatch.drafts.block.blocks import lay_out, locate
from specbatch.drafts.pack import ContextShard, PackTensors
from tests.drafts.block.case import TURNS, Sample, make_draft, pack_of
from tests.drafts.samples import WEIGHTS, difference, ours

MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=5)
DRAW = Draw(3, 4)
OPTIONS = {"first_slot": 0, "markov_rank": 3, "confidence": True, "draw": DRAW}


def share_of(pack: PackTensors, share: ContextShard, draw: Draw, proposals: int) -> PackTensors:
    rows = lay_out(pack.loss_mask, pack.lengths, pack.samples, draw, proposals).rows(share)
    own = {name: tensor[rows[name]] for name, tensor in pack.rows.items()}
    return PackTensors(pack.input_ids, pack.loss_mask, pack.lengths, own, pack.samples, share)


@given(MASKS, st.integers(1, 5), st.sampled_from([None, 2]))
def test_every_block_is_of_one_rank_which_has_the_rows_that_it_learns_from(masks, ranks, most):
    pack, draw = pack_of([Sample(mask, n) for n, mask in enumerate(masks)]), Draw(0, most)
    layout = lay_out(pack.loss_mask, pack.lengths, pack.samples, draw, 3)
    assert layout.targets == len(pack.rows["last"])
    assert len(layout.position_R) == len(pack.rows["aux"])
    chosen, rows = [], []
    for rank in range(ranks):
        blocks = locate(share_of(pack, ContextShard(rank, ranks), draw, 3), draw, 3)
        chosen += blocks.chosen.tolist()
        rows += blocks.row_C.tolist()
        assert (blocks.target_KA[0] >= 0).all()
    assert sorted(chosen) == list(range(len(layout.row_A)))
    assert rows == list(range(len(layout.position_R)))


def _rank(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    draft, pack = make_draft(**OPTIONS), _pack()
    draft.group, draft.slots_at_once = dist.group.WORLD, 9
    share = share_of(pack, ContextShard(rank, ranks), DRAW, draft.settings.shape.proposals)
    weights = WEIGHTS[: 2 * draft.settings.shape.proposals]
    result, gradients = ours(draft, share, weights)
    evaluated, proposed = draft.evaluate(share, weights)
    for tensor in (result, evaluated, *gradients.values()):
        dist.all_reduce(tensor)
    dist.all_reduce(proposed, dist.ReduceOp.MAX)
    if rank == 0:
        torch.save((result, gradients, evaluated, proposed), f"{folder}/found")
    dist.destroy_process_group()


def _pack() -> PackTensors:
    return pack_of([Sample(mask, seed) for seed, mask in enumerate([*TURNS, [False] * 9 + [True] * 20])])


@pytest.mark.light
def test_ranks_together_learn_exactly_what_one_does(tmp_path: Path) -> None:
    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    result, gradients, evaluated, proposed = torch.load(tmp_path / "found")
    draft = make_draft(**OPTIONS)
    weights = WEIGHTS[: 2 * draft.settings.shape.proposals]
    expected, of_one = ours(draft, _pack(), weights)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert difference(gradients, of_one) < 1e-10
    of_one, whole = draft.evaluate(_pack(), weights)
    torch.testing.assert_close(evaluated, of_one, rtol=1e-12, atol=1e-12)
    assert torch.equal(proposed, whole)

"""A pack that several ranks train together: who has what, and that all of them together do what one would."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from specbatch.drafts.eagle3.columns import lay_out
from specbatch.drafts.eagle3.contract import Eagle3Contract
from specbatch.drafts.pack import ContextShard, PackTensors, runs
from specbatch.snapshot.recording import RecordedPack
from specbatch.training.replay import divide, join
from tests.drafts.eagle3.test_model import WHOLE, make_draft, pack_of
from tests.drafts.samples import HEAD_DIM, KV_HEADS, WEIGHTS, Sample, difference, ours

STEPS = 3
MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=5)


def share_rows(
    steps: int, mask: torch.Tensor, lengths: tuple[int, ...], samples: tuple, share: ContextShard
) -> dict[str, torch.Tensor]:
    """Do the same as `Algorithm.share_rows` for any number of unrolled steps."""
    layout = lay_out(mask, lengths, steps)
    return layout.rows(layout.divide(share.ranks)[share.rank])


def layout_of(masks: list[list[bool]], steps: int = STEPS):
    return lay_out(torch.tensor([m for mask in masks for m in mask]), tuple(map(len, masks)), steps)


@given(MASKS)
def test_columns_and_targets_are_the_rows_that_the_capture_contract_names(masks):
    contract = Eagle3Contract((0, 1, 2), hidden=4)
    rows = [contract.rows(np.array(mask, dtype=bool)) for mask in masks]
    layout = layout_of(masks)
    assert layout.position_R.tolist() == [i for r in rows for i in r["aux"].tolist()]
    assert layout.targets == sum(r["last"].size for r in rows)
    tokens = layout.token_R.tolist()
    firsts = np.cumsum([0, *map(len, masks)])
    assert tokens == [int(first) + i for first, r in zip(firsts, rows, strict=False) for i in r["aux"].tolist()]
    targets = [int(first) + i for first, r in zip(firsts, rows, strict=False) for i in r["last"].tolist()]
    for step in range(STEPS):
        for column, row in enumerate(layout.target_KR[step].tolist()):
            reads, position = tokens[column] + 1 + step, int(layout.position_R[column])
            mask = masks[int(np.searchsorted(firsts, tokens[column], side="right")) - 1]
            chosen = mask[position + 1 : position + 3 + step]
            assert (row >= 0) == (len(chosen) == 2 + step and all(chosen))
            assert row < 0 or targets[row] == reads


@given(MASKS, st.integers(1, 5))
def test_every_column_is_of_one_rank_and_every_rank_has_the_rows_that_it_learns_from(masks, ranks):
    layout = layout_of(masks)
    shares = layout.divide(ranks)
    assert sorted(torch.cat(shares).tolist()) == list(range(len(layout.position_R)))
    for columns in shares:
        assert columns.tolist() == sorted(columns.tolist())
        learnt = {row for row in layout.target_KR[:, columns].flatten().tolist() if row >= 0}
        assert set(layout.rows(columns)["last"].tolist()) == learnt


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_live_columns_and_what_they_see_are_shared_evenly(ranks):
    """A long conversation of questions and answers, between shorter ones."""
    turn = [False] * 120 + [True] * 60
    layout = layout_of([turn * 4, turn * 60, [False] * 200 + [True] * 300])
    live = layout.live_steps() > 0
    counts = [int(live[columns].sum()) for columns in layout.divide(ranks)]
    assert max(counts) <= 1.05 * sum(counts) / ranks
    starts = torch.cat([torch.full((end - first,), first) for first, end in layout.samples])
    seen = torch.where(live, torch.arange(len(starts)) - starts + 1, 0)
    keys = [int(seen[columns].sum()) for columns in layout.divide(ranks)]
    assert max(keys) <= 1.2 * sum(keys) / ranks


@given(MASKS, st.integers(1, 4), st.integers(1, 4), st.integers(1, STEPS))
def test_parts_that_were_recorded_make_the_pack_again_and_are_divided_anew(masks, then, now, unrolled):
    layout = layout_of(masks)
    mask, lengths = torch.tensor([m for each in masks for m in each]), tuple(map(len, masks))
    whole = {"aux": torch.arange(len(layout.position_R))[:, None], "last": torch.arange(layout.targets)[:, None]}
    had, has = partial(share_rows, unrolled), partial(share_rows, STEPS)

    def recorded(share: ContextShard) -> RecordedPack:
        rows = had(mask, lengths, (), share)
        part = {"loss_mask": mask, **{name: tensor[rows[name]] for name, tensor in whole.items()}}
        return RecordedPack((0, 0), (), lengths, "", part, torch.zeros(2, unrolled))

    parts = [recorded(ContextShard(rank, then)) for rank in range(then)]
    joined = join(parts, had)
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    for rank in range(now):
        share = ContextShard(rank, now)
        mine, rows = divide(joined, parts[0], has, share), has(mask, lengths, (), share)
        assert all(torch.equal(mine[name], whole[name][rows[name]]) for name in whole if now > 1)
        assert all(torch.equal(mine[name], whole[name]) for name in whole if now == 1)


@given(st.sets(st.integers(0, 30)))
def test_runs_are_the_neighbours_among_numbers(numbers):
    ascending = torch.tensor(sorted(numbers), dtype=torch.int64)
    found = runs(ascending)
    assert [i for first, end in found for i in range(first, end)] == ascending.tolist()
    assert all(end < first for (_, end), (first, _) in pairwise(found))


def share_of(pack: PackTensors, share: ContextShard) -> PackTensors:
    wanted = share_rows(STEPS, pack.loss_mask, pack.lengths, (), share)
    rows = {name: tensor[wanted[name]] for name, tensor in pack.rows.items()}
    return PackTensors(pack.input_ids, pack.loss_mask, pack.lengths, rows, share=share)


def _samples() -> list[Sample]:
    turns = [False] * 9 + [True] * 6
    masks = [turns * 3, [True], [False, True, True], turns, [False] * 5]
    return [Sample(mask, seed) for seed, mask in enumerate(masks)]


class Sent(TorchDispatchMode):
    """Collectives, and shapes of what they carry."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str | int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and not func.__name__.startswith(("_wrap", "wait")):
            self.shapes.append((func.__name__, *args[0].shape))
        return func(*args, **(kwargs or {}))


def _rank(rank: int, ranks: int, folder: str) -> None:
    """Train a share, add up what all ranks got, and keep it for the test."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    draft = make_draft(STEPS, WHOLE)
    draft.group, draft.columns_at_once = dist.group.WORLD, 7
    pack = pack_of(_samples())
    with Sent() as sent:
        result, gradients = ours(draft, share_of(pack, ContextShard(rank, ranks)), WEIGHTS[:STEPS])
    for tensor in (result, *gradients.values()):
        dist.all_reduce(tensor)
    evaluated, proposed = draft.evaluate(share_of(pack, ContextShard(rank, ranks)), WEIGHTS[:STEPS])
    known = (proposed >= 0).sum()
    for tensor in (evaluated, known):
        dist.all_reduce(tensor)
    dist.all_reduce(proposed, dist.ReduceOp.MAX)
    if rank == 0:
        torch.save((result, gradients, sent.shapes), f"{folder}/result")
        torch.save((evaluated, proposed, known), f"{folder}/evaluated")
    dist.destroy_process_group()


@pytest.mark.light
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_learn_exactly_what_one_does_and_send_nothing_but_first_keys_and_values(
    tmp_path: Path, ranks: int
) -> None:
    mp.spawn(_rank, (ranks, str(tmp_path)), nprocs=ranks)
    result, gradients, sent = torch.load(tmp_path / "result")
    expected, of_one = ours(make_draft(STEPS, WHOLE), pack_of(_samples()), WEIGHTS[:STEPS])
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert difference(gradients, of_one) < 1e-10
    evaluated, proposed, known = torch.load(tmp_path / "evaluated")
    of_one, whole = make_draft(STEPS, WHOLE).evaluate(pack_of(_samples()), WEIGHTS[:STEPS])
    torch.testing.assert_close(evaluated, of_one, rtol=1e-12, atol=1e-12)
    assert torch.equal(proposed, whole)
    assert known == (whole >= 0).sum(), "no column is computed by two ranks"
    # Keys and values together; and back their gradients.
    most = max(map(len, layout_of([sample.mask for sample in _samples()]).divide(ranks)))
    assert set(sent) == {
        ("all_gather_into_tensor.default", most, 2, KV_HEADS, HEAD_DIM),
        ("reduce_scatter_tensor.default", ranks * most, 2, KV_HEADS, HEAD_DIM),
    }


@settings(max_examples=15, deadline=None)
@given(MASKS, st.integers(2, 4))
def test_shares_without_columns_or_targets_fit_their_tensors(masks, ranks):
    """Also where there are more ranks than columns."""
    pack = pack_of([Sample(mask, 0) for mask in masks])
    for rank in range(ranks):
        part = share_of(pack, ContextShard(rank, ranks))
        assert part.rows["aux"].shape[0] == len(layout_of(masks).divide(ranks)[rank])

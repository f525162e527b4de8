from __future__ import annotations

import hashlib
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbatch.plan import Plan

plans = st.builds(
    lambda lengths, seed, epochs, room, packs: Plan(
        np.array(lengths), seed=seed, epochs=epochs, tokens_per_pack=max(lengths) + room, packs_per_step=packs
    ),
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.integers(0, 2**63),
    st.integers(1, 4),
    st.integers(0, 60),
    st.integers(1, 6),
)


def all_packs(plan: Plan):
    return [pack for step in range(1, plan.steps + 1) for pack in plan.packs(step)]


@given(plans)
def test_every_sample_is_trained_once_an_epoch(plan):
    trained = Counter((pack.epoch, sample) for pack in all_packs(plan) for sample in pack.samples)
    samples = range(len(plan.lengths))
    assert trained == Counter({(epoch, sample): 1 for epoch in range(plan.epochs) for sample in samples})


@given(plans)
def test_no_pack_has_more_tokens_than_it_may(plan):
    assert all(plan.tokens(pack) <= plan.tokens_per_pack for pack in all_packs(plan))


@given(plans)
def test_steps_have_equally_many_packs_and_only_the_last_has_empty_ones(plan):
    for step in range(1, plan.steps + 1):
        packs = plan.packs(step)
        assert len(packs) == plan.packs_per_step
        assert step == plan.steps or all(pack.samples for pack in packs)
    assert any(pack.samples for pack in plan.packs(plan.steps))


@given(plans)
def test_packs_have_ids_of_their_own_and_know_their_step(plan):
    ids = [pack.id for pack in all_packs(plan)]
    assert len(set(ids)) == len(ids)
    assert all(plan.pack(pack.id) == pack for pack in all_packs(plan))
    assert all(plan.step_of(pack.id) == step for step in range(1, plan.steps + 1) for pack in plan.packs(step))


def packed_one_by_one(lengths: list[int], seed: int, epoch: int, room: int) -> list[tuple[int, ...]]:
    """The packs of an epoch as they were first made, in plain Python: shuffled by hash, next fit."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "little")

    def mixed(i: int) -> int:
        x = ((i + 1) * 0x9E3779B97F4A7C15 + key) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    packs: list[list[int]] = []
    taken = room + 1
    for sample in sorted(range(len(lengths)), key=mixed):
        if taken + lengths[sample] > room:
            packs.append([])
            taken = 0
        packs[-1].append(sample)
        taken += lengths[sample]
    return [tuple(pack) for pack in packs]


@given(plans)
def test_packs_are_those_that_were_made_one_by_one(plan):
    lengths = plan.lengths.tolist()
    for epoch in range(plan.epochs):
        expected = packed_one_by_one(lengths, plan.seed, epoch, plan.tokens_per_pack)
        assert [pack.samples for pack in all_packs(plan) if pack.epoch == epoch and pack.samples] == expected


@given(plans, st.integers(0, 9))
def test_sums_over_steps_are_those_of_their_packs(plan, fewer):
    steps = max(1, plan.steps - fewer)
    packs = [plan.packs(step) for step in range(1, steps + 1)]
    values = np.arange(len(plan.lengths)) ** 2 + 1
    assert plan.step_sums(values, steps).tolist() == [
        sum(int(values[sample]) for pack in step for sample in pack.samples) for step in packs
    ]
    counted = Counter(sample for step in packs for pack in step for sample in pack.samples)
    assert plan.times(steps).tolist() == [counted[sample] for sample in range(len(plan.lengths))]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(0, 9), st.integers(1, 4))
def test_held_out_packs_are_dealt_to_ranks_and_change_nothing_else(lengths, most, ranks):
    settings = {"seed": 3, "epochs": 1, "tokens_per_pack": 20, "packs_per_step": 2}
    alone = Plan(np.array([5] * 7), **settings)
    plan = Plan(np.array([5] * 7), heldout=np.array(lengths), heldout_packs=most, **settings)
    assert (plan.fingerprint, all_packs(plan)) == (alone.fingerprint, all_packs(alone))
    assert len(plan.heldout) <= most
    samples = [sample for pack in plan.heldout for sample in pack.samples]
    assert len(set(samples)) == len(samples)
    assert all(7 <= sample < 7 + len(lengths) for sample in samples)
    assert len(samples) == len(lengths) or len(plan.heldout) == most
    for number, pack in enumerate(plan.heldout):
        assert pack == plan.pack((-1, number))
        assert plan.tokens(pack) == sum(lengths[sample - 7] for sample in pack.samples) <= 20
        assert plan.step_of(pack.id) == 0
    assert sorted(pack.id for dealt in plan.assign_heldout(ranks) for pack in dealt) == [p.id for p in plan.heldout]


@given(plans, st.integers(1, 6))
def test_ranks_get_equally_many_packs_of_every_step(plan, ranks):
    if plan.packs_per_step % ranks:
        with pytest.raises(ValueError, match="divide"):
            plan.assign(1, ranks)
        return
    for step in range(1, plan.steps + 1):
        dealt = plan.assign(step, ranks)
        assert {len(packs) for packs in dealt} == {plan.packs_per_step // ranks}
        assert sorted(p.id for packs in dealt for p in packs) == sorted(p.id for p in plan.packs(step))


def test_epochs_are_shuffled_differently_and_seeds_too():
    lengths = np.full(100, 7)
    plan = Plan(lengths, seed=1, epochs=2, tokens_per_pack=70, packs_per_step=5)
    other = Plan(lengths, seed=2, epochs=2, tokens_per_pack=70, packs_per_step=5)
    first, second = plan.packs(1)[0].samples, plan.packs(3)[0].samples
    assert set(first) != set(second) != set(other.packs(1)[0].samples)


def test_the_plan_is_the_same_on_every_machine():
    plan = Plan(1 + np.arange(1000) % 97, seed=7, epochs=2, tokens_per_pack=256, packs_per_step=4)
    order = repr([pack.samples for pack in all_packs(plan)]).encode()
    assert plan.steps == 107
    assert hashlib.sha256(order).hexdigest()[:16] == "e92d1225268dec3c"


@pytest.mark.parametrize("epochs", [1, 3])
def test_packs_that_do_not_fill_a_step_are_carried_into_the_next_epoch(epochs):
    plan = Plan(np.full(10, 5), seed=0, epochs=epochs, tokens_per_pack=5, packs_per_step=4)
    assert plan.steps == -(-10 * epochs // 4)
    assert sum(bool(pack.samples) for pack in all_packs(plan)) == 10 * epochs


def test_ranks_have_even_cost_over_a_hundred_steps():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 20_000), 1, 4096).astype(int)
    plan = Plan(lengths, seed=0, epochs=1, tokens_per_pack=4096, packs_per_step=8)
    cost = np.zeros(4)
    for step in range(1, min(101, plan.steps)):
        for rank, packs in enumerate(plan.assign(step, 4)):
            cost[rank] += sum(plan.tokens(pack) for pack in packs)
    assert cost.max() / cost.min() < 1.02


def test_a_million_samples_are_planned_in_two_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 1_000_000), 1, 8192).astype(int)
    begun = time.process_time()
    plan = Plan(lengths, seed=0, epochs=1, tokens_per_pack=8192, packs_per_step=16)
    assert plan.step_sums(plan.lengths, plan.steps).sum() == lengths.sum()
    assert time.process_time() - begun < 2


def test_plans_of_other_corpora_or_settings_have_other_fingerprints():
    base = {"seed": 0, "epochs": 1, "tokens_per_pack": 50, "packs_per_step": 2}
    lengths = np.arange(1, 40)
    plan = Plan(lengths, **base)
    assert plan.fingerprint == Plan(lengths.copy(), **base).fingerprint
    for key, value in (("seed", 1), ("epochs", 2), ("tokens_per_pack", 60), ("packs_per_step", 4)):
        assert Plan(lengths, **{**base, key: value}).fingerprint != plan.fingerprint
    assert Plan(lengths[::-1], **base).fingerprint != plan.fingerprint


@pytest.mark.parametrize(
    ("lengths", "change", "says"),
    [([], {}, "no samples"), ([3, 60], {}, "3 to 60"), ([0], {}, "0 to 0"), ([1], {"packs_per_step": 0}, "at least 1")],
)
def test_what_cannot_be_planned_is_refused(lengths, change, says):
    settings = {"seed": 0, "epochs": 1, "tokens_per_pack": 50, "packs_per_step": 2, **change}
    with pytest.raises(ValueError, match=says):
        Plan(np.array(lengths), **settings)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0])), min_size=1, max_size=3),
    st.integers(0, 99),
    st.integers(1, 3),
)
def test_sources_count_by_their_weights_and_no_pack_has_a_sample_twice(weighted, seed, epochs):
    lengths = np.arange(sum(size for size, _ in weighted)) % 7 + 1
    settings = {"seed": seed, "epochs": epochs, "tokens_per_pack": 20, "packs_per_step": 2}
    if all(int(size * weight * epochs) == 0 for size, weight in weighted):
        with pytest.raises(ValueError, match="nothing is left to train"):
            Plan(lengths, weighted=weighted, **settings)
        return
    plan = Plan(lengths, weighted=weighted, **settings)
    assert all(len(set(pack.samples)) == len(pack.samples) for pack in all_packs(plan))
    assert all(plan.tokens(pack) <= 20 for pack in all_packs(plan))
    times, begin = plan.times(plan.steps), 0
    for size, weight in weighted:
        own = times[begin : begin + size]
        begin += size
        assert own.max() - own.min() <= 1
        assert own.sum() == int(size * weight * epochs)
    again = Plan(lengths, weighted=weighted, **settings)
    assert all_packs(again) == all_packs(plan)


def test_weights_that_are_all_one_change_nothing():
    settings = {"seed": 1, "epochs": 2, "tokens_per_pack": 20, "packs_per_step": 2}
    lengths = np.arange(1, 16)
    plain, weighted = Plan(lengths, **settings), Plan(lengths, weighted=[(5, 1.0), (10, 1.0)], **settings)
    assert (plain.fingerprint, all_packs(plain)) == (weighted.fingerprint, all_packs(weighted))
    other = Plan(lengths, weighted=[(5, 2.0), (10, 1.0)], **settings)
    assert other.fingerprint != plain.fingerprint
    with pytest.raises(ValueError, match="sources of 14 samples for 15"):
        Plan(lengths, weighted=[(4, 2.0), (10, 1.0)], **settings)

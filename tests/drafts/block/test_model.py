"""Block drafts against an oracle in float64: loss, every gradient, every accuracy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specbatch.drafts.block import loss
from specbatch.drafts.block.anchors import Draw, anchors, learning
from specbatch.drafts.block.objective import Objective
from specbatch.drafts.masks import Masks
from tests.drafts.block.case import TURNS, Sample, make_draft, pack_of, theirs
from tests.drafts.samples import VOCAB, WEIGHTS, difference, ours

OBJECTIVES = [
    Objective(distribution=1.0),
    Objective(token=1.0),
    Objective(token=0.1, distance=0.9),
    Objective(token=0.5, distribution=0.3, distance=0.2),
    Objective(distribution=1.0, d_pace=True),
    Objective(token=1.0, d_pace=True),
]
MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(
    masks=MASKS, block=st.integers(2, 5), layers=st.integers(1, 2), first_slot=st.integers(0, 1),
    objective=st.sampled_from(OBJECTIVES), most=st.sampled_from([None, 1, 3]), heads=st.sampled_from([0, 1, 2, 3]),
    at_once=st.integers(1, 40), recompute=st.sampled_from(["none", "all_but_attention", "all"]),
    changed_logits=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_loss_gradients_and_accuracies_are_the_oracles(
    masks, block, layers, first_slot, objective, most, heads, at_once, recompute, changed_logits, seed
):
    samples = [Sample(mask, seed + i) for i, mask in enumerate(masks)]
    draft = make_draft(
        block=block, layers=layers, first_slot=first_slot, draw=Draw(seed, most), objective=objective,
        markov_rank=3 * (heads % 2), confidence=heads > 1, changed_logits=changed_logits,
    )  # fmt: skip
    draft.slots_at_once, draft.recompute = at_once, recompute
    weights = WEIGHTS[: (block - first_slot) * (2 if heads > 1 else 1)]
    result, gradients = ours(draft, pack_of(samples), weights)
    expected, counts, expected_gradients = theirs(draft, samples, weights)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-11)
    assert difference(gradients, expected_gradients) < 1e-9
    mine = Masks.of([np.array(s.mask) for s in samples], [s.id for s in samples])
    learnt = mine.total(learning(mine, anchors(mine, draft.settings.draw), block - first_slot))
    assert learnt.sum(-1).tolist() == counts


def reference(**options):
    draft, samples = make_draft(**options), [Sample(mask, i) for i, mask in enumerate(TURNS)]
    weights = WEIGHTS[: draft.settings.shape.proposals]
    return draft, samples, weights, ours(draft, pack_of(samples), weights)[1]


@pytest.mark.parametrize("first_slot", [0, 1])
@pytest.mark.parametrize(
    "wrong",
    [{"sees_own_row": True}, {"crosses": True}, {"shifted_slots": 1}, {"bias": None}, {"scale": 1}, {"cap": None}],
)
def test_the_comparison_fails_when_a_block_sees_too_much_or_is_shifted_or_the_target_is_another(first_slot, wrong):
    draft, samples, weights, gradients = reference(first_slot=first_slot, changed_logits=True)
    assert difference(gradients, theirs(draft, samples, weights)[2]) < 1e-9
    assert difference(gradients, theirs(draft, samples, weights, **wrong)[2]) > 1e-3


def test_the_comparison_fails_when_slots_learn_the_token_behind_theirs():
    draft, samples, weights, gradients = reference()
    of_no_weight = torch.zeros(1, dtype=weights.dtype)
    assert difference(gradients, theirs(draft, samples, torch.cat([weights, of_no_weight]), first_slot=0)[2]) > 1e-3


def test_the_order_of_samples_in_a_pack_does_not_matter():
    draft, samples, weights, gradients = reference()
    assert difference(ours(draft, pack_of(samples[::-1]), weights)[1], gradients) < 1e-9


@pytest.mark.parametrize("objective", OBJECTIVES[:2] + OBJECTIVES[4:])
def test_means_give_what_slots_give(monkeypatch, objective):
    draft, samples, weights, gradients = reference(objective=objective)
    result = draft(pack_of(samples), weights).detach()
    monkeypatch.setattr(loss, "_means_suffice", lambda *_: False)
    by_slots, others = ours(draft, pack_of(samples), weights)
    torch.testing.assert_close(result, by_slots, rtol=1e-11, atol=1e-12)
    assert difference(gradients, others) < 1e-10


@pytest.mark.parametrize("most", [None, 2])
def test_pieces_of_scores_positions_and_blocks_change_nothing(monkeypatch, most):
    from specbatch.drafts import memory

    draft, samples, weights, gradients = reference(draw=Draw(1, most))
    monkeypatch.setattr(memory, "CPU_BLOCK_SCORES", 3)
    monkeypatch.setattr(memory, "CPU_CHUNK_BYTES", 2 * VOCAB * 6 * 8)
    draft.slots_at_once = 9
    assert difference(ours(draft, pack_of(samples), weights)[1], gradients) < 1e-9


@pytest.mark.parametrize("options", [{}, {"first_slot": 0, "markov_rank": 3, "confidence": True}])
def test_an_evaluation_says_what_training_does_and_which_tokens_are_proposed(options):
    draft = make_draft(**options)
    samples = [Sample(mask, i) for i, mask in enumerate(TURNS)]
    pack, proposals = pack_of(samples), draft.settings.shape.proposals
    weights = WEIGHTS[: proposals * (2 if draft.settings.shape.confidence else 1)]
    result, proposed = draft.evaluate(pack, weights)
    assert torch.equal(result, draft(pack, weights).detach())
    first, right = 0, [0] * proposals
    for sample in samples:
        known = Masks.of([np.array(sample.mask)])
        learnt = learning(known, anchors(known, draft.settings.draw), proposals)
        for k in range(proposals):
            for a in range(len(sample.mask)):
                assert (proposed[k, first + a] >= 0) == learnt[k, a]
                if learnt[k, a]:
                    right[k] += int(proposed[k, first + a] == (draft.target_head @ sample.last[a + k]).argmax())
        first += len(sample.mask)
    assert result[1, :proposals].tolist() == right


def test_the_gradient_can_be_taken_only_once_and_only_of_the_sum():
    draft, samples, weights, _ = reference()
    with pytest.raises(RuntimeError, match="only the sum"):
        draft(pack_of(samples), weights)[0, 0].backward()
    total = draft(pack_of(samples), weights)[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(ValueError, match="only once"):
        total.backward(inputs=[draft.norm.weight])


def test_a_pack_that_lacks_rows_is_refused():
    draft, samples, weights, _ = reference()
    pack = pack_of(samples)
    pack.rows["last"] = pack.rows["last"][1:]
    with pytest.raises(ValueError, match="rows of last, its masks ask for"):
        draft(pack, weights)

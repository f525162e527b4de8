"""The draft against an oracle in float64: loss, every gradient, every accuracy."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specbatch.drafts.eagle3.contract import Eagle3Contract
from specbatch.drafts.eagle3.cost import counts_of
from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.eagle3.model import LOSSES, Eagle3Module, Eagle3Settings
from specbatch.drafts.masks import Masks
from specbatch.drafts.memory import Recomputation
from specbatch.drafts.pack import PackTensors
from specbatch.drafts.rope import Rope
from tests.drafts.eagle3.oracle import unroll_sample
from tests.drafts.samples import (
    EPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    THETA,
    VOCAB,
    WEIGHTS,
    Sample,
    difference,
    gradients_of,
    ours,
    packed,
)

CONTRACT = Eagle3Contract(aux_layers=(0, 1, 2), hidden=HIDDEN)


def make_draft(
    steps: int,
    draft_ids: tuple[int, ...],
    *,
    own_embedding: bool = False,
    fc_norm: bool = False,
    norm_output: bool = False,
    loss: str = "kl",
) -> Eagle3Module:
    shape = Shape(
        HIDDEN, 12, HEADS, KV_HEADS, HEAD_DIM, VOCAB, len(draft_ids), own_embedding=own_embedding, fc_norm=fc_norm,
        norm_output=norm_output,
    )  # fmt: skip
    config = Eagle3Settings(
        shape=shape,
        rms_norm_eps=EPS,
        rope=Rope(HEAD_DIM, THETA, 64),
        ttt_steps=steps,
        draft_ids=draft_ids,
        loss=loss,
    )
    draft = Eagle3Module(config).double()
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(2, VOCAB, HIDDEN, dtype=torch.float64, generator=generator)
    draft.initialize(3, table[0], table[1])
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    draft.attach(table[0], table[1])
    return draft


def pack_of(samples: list[Sample]) -> PackTensors:
    return packed(CONTRACT, samples)


def theirs(draft: Eagle3Module, samples: list[Sample], weights: torch.Tensor):
    draft.zero_grad()
    steps = draft.config.ttt_steps
    w = dict(draft.named_parameters())
    losses, correct, counts = torch.zeros(steps, dtype=torch.float64), np.zeros(steps), np.zeros(steps)
    for sample in samples:
        loss, right, count = unroll_sample(
            w,
            embedding=draft.embed_tokens.weight if draft.embedding is None else draft.embedding,
            target_head=draft.target_head,
            aux=sample.aux,
            last=sample.last,
            ids=sample.ids,
            mask=sample.mask,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            eps=EPS,
            theta=THETA,
            steps=steps,
            fc_norm=draft.config.shape.fc_norm,
            norm_output=draft.config.shape.norm_output,
            objective=draft.config.loss,
        )
        losses = losses + torch.stack(loss)
        correct += right
        counts += count
    total = (losses * weights).sum()
    if total.requires_grad:
        total.backward()
    return (losses * weights).detach(), correct, counts, gradients_of(draft)


WHOLE = tuple(range(VOCAB))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sets(st.integers(0, VOCAB - 1), min_size=1),
    st.integers(1, 30),
    st.sampled_from(get_args(Recomputation)),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(LOSSES)),
    st.integers(0, 1000),
)
@example(
    masks=[[True], [False, True, True]],
    steps=4,
    vocabulary={*range(VOCAB)},
    at_once=9,
    recompute="none",
    fc_norm=True,
    norm_output=True,
    loss="lk_lambda",
    seed=0,
)
def test_loss_gradients_and_accuracies_are_the_oracles(
    masks, steps, vocabulary, at_once, recompute, fc_norm, norm_output, loss, seed
):
    """Packs, masks, vocabularies, losses; EAGLE-3 and 3.1; samples of one token and of one less than there are
    unrolled steps among them."""
    samples = [Sample(mask, seed + i) for i, mask in enumerate(masks)]
    draft = make_draft(steps, tuple(sorted(vocabulary)), fc_norm=fc_norm, norm_output=norm_output, loss=loss)
    draft.columns_at_once, draft.recompute = at_once, recompute
    weights = WEIGHTS[:steps]
    result, gradients = ours(draft, pack_of(samples), weights)
    losses, correct, counts, expected = theirs(draft, samples, weights)
    torch.testing.assert_close(result[0], losses, rtol=1e-11, atol=1e-12)
    assert result[1].tolist() == correct.tolist()
    assert difference(gradients, expected) < 1e-9
    ours_counts = counts_of(Masks.of([np.array(s.mask, dtype=bool) for s in samples]), steps).sum(-1)
    assert ours_counts.tolist() == counts.tolist()


def test_the_gradient_of_an_embedding_of_its_own_is_the_oracles():
    samples = [Sample([False] * 2 + [True] * 4, 0), Sample([True] * 5, 1)]
    draft = make_draft(3, (0, 3, 4, 8, 9, 15, 22), own_embedding=True)
    _, gradients = ours(draft, pack_of(samples), WEIGHTS[:3])
    expected = theirs(draft, samples, WEIGHTS[:3])[3]
    assert expected["embed_tokens.weight"].any()
    assert difference(gradients, expected) < 1e-9


TURNS = [[False] * 3 + [True] * 5 + [False] * 2 + [True] * 4, [True], [False, True, True]]


def reference() -> tuple[Eagle3Module, list[Sample], dict[str, torch.Tensor]]:
    draft, samples = make_draft(3, WHOLE), [Sample(mask, i) for i, mask in enumerate(TURNS)]
    return draft, samples, theirs(draft, samples, WEIGHTS[:3])[3]


def test_the_comparison_fails_when_one_row_is_shifted():
    draft, samples, expected = reference()
    pack = pack_of(samples)
    pack.rows["last"] = pack.rows["last"].roll(1, 0)
    assert difference(ours(draft, pack, WEIGHTS[:3])[1], expected) > 1e-3


def test_the_comparison_fails_when_a_mask_is_off_by_one():
    draft, samples, _ = reference()
    pack = pack_of(samples)
    samples[0].mask = [*samples[0].mask[1:], False]
    expected = theirs(draft, samples, WEIGHTS[:3])[3]
    assert difference(ours(draft, pack, WEIGHTS[:3])[1], expected) > 1e-3


def test_the_comparison_fails_when_a_neighbour_is_visible():
    draft, samples, _ = reference()
    joined = Sample(samples[0].mask + samples[2].mask, 0)
    joined.ids = samples[0].ids + samples[2].ids
    joined.aux, joined.last = (torch.cat([getattr(samples[0], n), getattr(samples[2], n)]) for n in ("aux", "last"))
    expected = theirs(draft, [samples[0], samples[2]], WEIGHTS[:3])[3]
    assert difference(ours(draft, pack_of([joined]), WEIGHTS[:3])[1], expected) > 1e-3


def test_the_order_of_samples_in_a_pack_does_not_matter():
    draft, samples, expected = reference()
    assert difference(ours(draft, pack_of(samples[::-1]), WEIGHTS[:3])[1], expected) < 1e-9


def test_the_blocks_of_a_long_sample_give_the_same(monkeypatch):
    from specbatch.drafts import memory

    draft, samples, expected = reference()
    monkeypatch.setattr(memory, "CPU_BLOCK_SCORES", 3)
    monkeypatch.setattr(memory, "CPU_UNROLLED_BYTES", 2 * VOCAB * 6 * 8)
    assert difference(ours(draft, pack_of(samples), WEIGHTS[:3])[1], expected) < 1e-9


def test_an_evaluation_says_what_training_does_and_which_tokens_are_proposed():
    ids = (0, 3, 4, 8, 9, 15, 22)
    draft, samples = make_draft(3, ids), [Sample(mask, i) for i, mask in enumerate(TURNS)]
    pack = pack_of(samples)
    result, proposed = draft.evaluate(pack, WEIGHTS[:3])
    assert torch.equal(result, draft(pack, WEIGHTS[:3]).detach())
    mask, first, right = pack.loss_mask.tolist(), 0, [0, 0, 0]
    for sample in samples:
        for k in range(3):
            for i in range(len(sample.mask)):
                learns = i + 2 + k < len(sample.mask) and all(mask[first + i + 1 : first + i + 3 + k])
                assert i + 1 == len(sample.mask) or (proposed[k, first + i + 1] >= 0) == learns
                if learns:
                    truth = ids[int((draft.target_head @ sample.last[i + 1 + k]).argmax())]
                    right[k] += int(proposed[k, first + i + 1] == truth)
        first += len(sample.mask)
    assert result[1].tolist() == right


def test_the_gradient_of_a_parameter_is_what_was_added_up_and_no_copy_of_it():
    draft, samples, _ = reference()
    draft.zero_grad()
    result = draft(pack_of(samples), WEIGHTS[:3])
    places = {total.data_ptr() for total in result.grad_fn.found if total is not None}
    result[0].sum().backward()
    assert draft.lm_head.weight.grad.data_ptr() in places


def test_only_the_sum_of_the_losses_can_be_differentiated_and_only_once():
    draft, samples, _ = reference()
    with pytest.raises(RuntimeError, match="only the sum"):
        draft(pack_of(samples), WEIGHTS[:3])[0, 0].backward()
    total = draft(pack_of(samples), WEIGHTS[:3])[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(ValueError, match="only once"):
        total.backward(inputs=[draft.lm_head.weight])


def test_a_frozen_parameter_gets_no_gradient_and_the_others_keep_theirs():
    draft, samples, expected = reference()
    frozen = ("lm_head.weight", "layers.0.mlp.up_proj.weight")
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_(name not in frozen)
    _, gradients = ours(draft, pack_of(samples), WEIGHTS[:3])
    assert not any(gradients.pop(name).any() for name in frozen)
    assert difference({**expected, **gradients}, expected) < 1e-9


def test_without_gradients_the_loss_is_the_same():
    draft, samples, _ = reference()
    with torch.no_grad():
        result = draft(pack_of(samples), WEIGHTS[:3])
    torch.testing.assert_close(result, ours(draft, pack_of(samples), WEIGHTS[:3])[0])
    assert not result.requires_grad


def test_a_pack_without_samples_trains_as_zero():
    draft = make_draft(3, WHOLE)
    result, gradients = ours(draft, pack_of([]), WEIGHTS[:3])
    assert draft.evaluate(pack_of([]), WEIGHTS[:3])[1].shape == (3, 0)
    assert not result.any()
    assert not any(g.any() for g in gradients.values())


def test_channels_of_all_sizes_count_alike_after_calibration():
    draft = make_draft(1, WHOLE)
    before = draft.fc.weight.detach().clone()
    aux = torch.randn(500, 3 * HIDDEN, dtype=torch.float64) * torch.logspace(-2, 3, 3 * HIDDEN)
    draft.calibrate({"aux": aux.square().mean(0)})
    normalised = aux / aux.square().mean(0).sqrt()
    torch.testing.assert_close(aux @ draft.fc.weight.T, normalised @ before.T)


def test_channels_of_all_sizes_count_alike_after_the_norms_of_layers_are_calibrated():
    draft = make_draft(1, WHOLE, fc_norm=True)
    signs = torch.randint(2, (500, 3 * HIDDEN), dtype=torch.float64) * 2 - 1
    aux = signs * torch.logspace(-2, 3, 3 * HIDDEN, dtype=torch.float64)
    draft.calibrate({"aux": aux.square().mean(0)})
    normed = [norm(layer) for norm, layer in zip(draft.fc_norm, aux.split(HIDDEN, -1), strict=True)]
    # Of the smallest channels of all, the norm's epsilon takes a part.
    torch.testing.assert_close(torch.cat(normed[1:], -1), signs[:, HIDDEN:], rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm_output", [False, True])
def test_the_first_logits_are_small_and_the_unrolled_state_is_not(norm_output):
    draft = make_draft(1, WHOLE, norm_output=norm_output)
    table, head = torch.randn(2, VOCAB, HIDDEN, dtype=torch.float64)
    draft.initialize(0, table, head)
    scale = draft.norm.weight[:, None] * draft.lm_head.weight.T / head.T
    torch.testing.assert_close(scale, torch.full_like(scale, 0.3), rtol=1e-6, atol=0)
    assert (draft.norm.weight[0] == 1) == norm_output


def test_the_comparison_fails_when_the_state_is_normalised_and_should_not_be():
    draft, samples = make_draft(3, WHOLE), [Sample(mask, i) for i, mask in enumerate(TURNS)]
    other = make_draft(3, WHOLE, norm_output=True)
    other.load_state_dict(draft.state_dict())
    first, later = (theirs(d, samples, WEIGHTS[:3])[0] for d in (draft, other))
    assert first[0] == pytest.approx(later[0].item(), rel=1e-12), "the head reads the same state in the first step"
    assert abs(first[1] - later[1]) > 1e-3


def test_rows_that_no_column_reads_do_not_matter():
    draft, samples, expected = reference()
    for sample in samples:
        rows = CONTRACT.rows(np.array(sample.mask, dtype=bool))
        for name in ("aux", "last"):
            unread = torch.ones(len(sample.mask), dtype=torch.bool)
            unread[torch.from_numpy(rows[name])] = False
            getattr(sample, name)[unread] = 1e4
    assert difference(theirs(draft, samples, WEIGHTS[:3])[3], expected) < 1e-12


def test_a_pack_with_too_few_rows_is_refused():
    draft, samples, _ = reference()
    pack = pack_of(samples)
    pack.rows["aux"] = pack.rows["aux"][1:]
    with pytest.raises(ValueError, match="rows of aux"):
        draft(pack, WEIGHTS[:3])


def test_parts_of_images_are_read_from_the_pack_and_not_from_the_embedding():
    draft, samples = make_draft(3, WHOLE), [Sample([False] * 4 + [True] * 5, 1), Sample([False] * 2 + [True] * 4, 2)]
    parts = torch.randn(2, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for place in (1, 2):
        samples[0].ids[place] = VOCAB + place - 1
    text = draft.embedding
    draft.embedding = torch.cat([text, parts])
    *_, expected = theirs(draft, samples, WEIGHTS[:3])
    contract = Eagle3Contract((0, 1, 2), HIDDEN, images=True)
    pack = pack_of(samples)
    pack.rows["embeds"] = torch.cat(
        [
            draft.embedding[torch.tensor(sample.ids)][contract.rows(np.array(sample.mask))["embeds"]]
            for sample in samples
        ]
    )
    pack.input_ids[pack.input_ids >= VOCAB] = 0
    draft.embedding = text
    assert difference(ours(draft, pack, WEIGHTS[:3])[1], expected) < 1e-12
    pack.rows["embeds"] = pack.rows["embeds"].roll(1, 0)
    assert difference(ours(draft, pack, WEIGHTS[:3])[1], expected) > 1e-3
    pack.rows["embeds"] = pack.rows["embeds"][1:]
    with pytest.raises(ValueError, match="rows of embeds"):
        draft(pack, WEIGHTS[:3])


def test_frequencies_stay_exact_at_far_positions():
    rope = Rope(64, 1e5, 1 << 17)
    cos, sin = rope.rotation(torch.tensor([100_000]), torch.bfloat16)
    angle = 100_000 * 1e5 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    cos32, _ = rope.rotation(torch.tensor([100_000]), torch.float32)
    assert (cos32.flatten().double() - angle.cos()).abs().max() < 1e-6
    assert cos.dtype == sin.dtype == torch.bfloat16

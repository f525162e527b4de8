"""Counts against those of training itself, formulas against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from specbatch.config import Config, load_config
from specbatch.config.sections import SlurmComponent
from specbatch.drafts.eagle3.columns import lay_out
from specbatch.drafts.eagle3.contract import Eagle3Contract
from specbatch.drafts.eagle3.cost import costs_of, live_columns
from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.masks import Masks
from specbatch.errors import UserError
from specbatch.planning import Known, budget
from specbatch.planning.flops import ActiveWeights, active_weights, engine_flops
from specbatch.planning.pipeline import Deployment, times
from specbatch.planning.rates import Rate, Rates, covered
from specbatch.planning.text import lines
from specbatch.target import AttentionLayers, attention, read_target
from specbatch.units import bytes_text

CONTRACT = Eagle3Contract((0, 1, 2), 4)
SHAPE = Shape(hidden=2, intermediate=5, heads=2, kv_heads=1, head_dim=2, vocab=9, draft_vocab=7)


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=14), min_size=1, max_size=5), st.integers(1, 4))
def test_the_costs_of_many_samples_are_those_of_each(masks, ttt_steps):
    both = Masks.of([np.array(mask) for mask in masks])
    costs = costs_of(both, ttt_steps, SHAPE)
    for i, mask in enumerate(masks):
        rows = CONTRACT.rows(np.array(mask))
        aux, last = rows["aux"].size, rows["last"].size
        assert (both.lengths_S[i], both.loss_tokens_S[i]) == (len(mask), sum(mask))
        assert (costs.rows_S["aux"][i], costs.rows_S["last"][i]) == (aux, last)
        read = [int(positions[-1]) + 1 for positions in rows.values() if positions.size]
        assert costs.captured_S[i] == max(read, default=0)
        alone = costs_of(Masks.of([np.array(mask)]), ttt_steps, SHAPE)
        assert (costs.flops_S[i], costs.forward_flops_S[i]) == (alone.flops_S[0], alone.forward_flops_S[0])
        layout, pairs = lay_out(torch.tensor(mask), (len(mask),), ttt_steps), 0
        for k in range(ttt_steps):
            live = layout.live_steps() > k
            assert costs.computed_TS[k, i] == int(live.sum())
            pairs += int((torch.arange(aux)[live] + 1 + k).sum())
            assert live_columns(both, k + 1)[1][i] == pairs, "and so of each step"
            assert costs.counts_TS[k, i] == int((layout.target_KR[k] >= 0).sum())


def test_operations_of_a_draft_by_hand():
    """Three tokens, all of them loss tokens: one target position, which column 0 learns from in the first step."""
    masks = Masks.of([np.array([True] * 3)])
    costs = costs_of(masks, 2, SHAPE)
    first, key_value, token, layer = 6 * 2, 4 * 2 * 2, 2 * (4 + 2 * 2), 2 * 4 + 4 * 2 + 3 * 2 * 5
    target, head, score = 2 * 7, 2 * 7, 2 * 4
    forward = 2 * (first + key_value + token + layer + target + head + score)
    assert costs.forward_flops_S.tolist() == [forward]
    backward = 2 * (2 * first + 3 * (key_value + token + layer + head) + target + 3.5 * score)
    assert costs.flops_S.tolist() == [backward]
    assert costs_of(masks, 2, replace(SHAPE, train_head=False)).flops_S.tolist() == [backward - 2 * head]


def test_operations_of_an_engine_by_hand(tiny_target: Path):
    target = read_target(tiny_target)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    assert active_weights(target) == ActiveWeights(6 * layer, "bf16")
    found = engine_flops(attention(target), 6 * layer, np.array([0, 10]))
    assert found.tolist() == [0, 2 * 6 * layer * 10 + 6 * 4 * 64 * 100 / 2]


def test_a_token_passes_through_the_experts_that_it_is_sent_to(tiny_target: Path, tmp_path: Path):
    names = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": torch.zeros(8, 4) for n in range(8)}
    names |= {
        "model.layers.0.mlp.shared_experts.up_proj.weight": torch.zeros(8, 4),
        "model.layers.0.mlp.experts.0.down_proj.weight_packed": torch.zeros(8, 1, dtype=torch.int32),
        "model.embed_tokens.weight": torch.zeros(512, 64),
        "vision.layers.0.weight": torch.zeros(9, 9),
    }
    config = json.loads((tiny_target / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 2, "n_routed_experts": 8}))
    save_file(names, tmp_path / "model.safetensors")
    assert active_weights(read_target(tmp_path)).count == 2 * 32 + 32 + 64 // 4


def test_a_window_and_a_state_of_fixed_size_see_less_than_everything():
    """Five tokens: 25 / 2 pairs, less 9 / 2 that are more than two apart."""
    full, sliding, recurrent = (
        AttentionLayers(1, 8),
        AttentionLayers(2, 8, window=2),
        AttentionLayers(3, 0, token_flops=7),
    )
    found = [engine_flops((kind,), 0, np.array([5]))[0] for kind in (full, sliding, recurrent)]
    assert found == [8 * 25 / 2, 2 * 8 * (25 - 9) / 2, 3 * 7 * 5]
    assert engine_flops((full, sliding, recurrent), 10, np.array([5]))[0] == sum(found) + 2 * 10 * 5


def test_intervals_that_overlap_count_once():
    assert covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.4)]) == pytest.approx(4.0)


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, count in (("train", 40), ("heldout", 6)):
        answer = {"role": "assistant", "content": "so it is " * 9}
        rows = [{"messages": [{"role": "user", "content": f"{name} {i}"}, answer]} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.yaml").write_text(
        f"run: {{dir: '{tmp_path}/run'}}\ntarget: {{path: '{tiny_target}'}}\n"
        "data: {train: [train.jsonl], heldout: [heldout.jsonl], max_tokens: 128, cache_dir: cache}\n"
        "draft: {vocab_size: 256, ttt_steps: 3}\n"
        "training: {tokens_per_pack: 256, packs_per_step: 2, warmup_steps: 0, evaluate_interval_steps: 3}\n"
        "store: {bytes_per_rank: 16MiB}\nsnapshot: {interval: 3}\n"
    )
    return load_config(tmp_path / "a.yaml")


def test_a_budget_adds_up(config: Config):
    found = budget(config, Known(engine_tokens_per_s=1000.0, trainer_tokens_per_s=100.0))
    work, spent = found.work, found.times
    assert (work.samples, work.steps, found.warnings) == (40, work.plan.steps, [])
    assert spent.engine_tokens_per_s == pytest.approx(1000.0)
    assert spent.trainer_tokens_per_s == pytest.approx(100.0)
    assert spent.engines_s == pytest.approx(work.captured_tokens / 1000)
    evaluations = found.layout.evaluations * work.evaluation_flops / found.rates.rank.flops_per_s
    assert spent.ranks_s == pytest.approx(work.tokens / 100 + evaluations)
    assert found.layout.evaluations == -(-work.steps // 3)
    assert spent.total_s == pytest.approx(spent.fill_s + spent.ranks_s)
    assert spent.device_hours == pytest.approx(2 * spent.total_s / 3600)
    assert work.bytes < work.tokens * work.full_token_bytes
    text = "\n".join(lines(found))
    assert "engines will wait for ranks" in text
    assert f"{work.steps} of 2 packs" in text
    assert f"{bytes_text(sum(found.rank_bytes.values()))} of a GPU for a rank" in text
    assert json.loads(json.dumps(found.as_json()))["work"]["live"] == list(work.live)


def test_steps_that_are_not_made_do_not_count(config: Config):
    whole = budget(config, Known()).work
    config.training = replace(config.training, max_steps=2)
    part = budget(config, Known()).work
    assert part.steps == 2
    packs = part.plan.packs(1) + part.plan.packs(2)
    assert part.tokens == sum(map(part.plan.tokens, packs)) < whole.tokens
    assert part.trainer_flops == pytest.approx(part.trainer_flops_of(packs))
    config.training = replace(config.training, max_steps=None, epochs=3)
    assert budget(config, Known()).work.tokens == 3 * whole.tokens


def test_a_step_that_the_store_can_not_hold_is_an_error_with_both_numbers(config: Config):
    config.training = replace(config.training, packs_per_step=4000, epochs=1000, evaluate_interval_steps=None)
    with pytest.raises(UserError, match=r"hold 13\.6 MiB, but the hidden states of step 1 take 3\d\d\.\d MiB"):
        budget(config, Known())


def test_the_slower_side_decides_and_without_room_both_take_turns(config: Config):
    work = budget(config, Known()).work
    rates = Rates(Rate(work.engine_flops / 60, ""), Rate(work.trainer_flops / 10, ""))
    layout = Deployment(engines=2, tensor_parallel=4, ranks=1, room_bytes=1 << 30, evaluations=0)
    spent = times(work, rates, layout)
    assert (layout.devices, spent.overlap) == (9, True)
    assert spent.total_s - spent.fill_s == pytest.approx(30.0)
    assert spent.engines_per_rank == pytest.approx(6.0)
    tight = times(work, rates, replace(layout, room_bytes=work.largest_step_bytes))
    assert not tight.overlap
    assert tight.total_s - tight.fill_s == pytest.approx(40.0)


def test_a_job_s_nodes_cost_what_its_site_charges(config: Config):
    assert "node-hours" not in "\n".join(lines(budget(config, Known())))
    with_gpu = SlurmComponent(gpus_per_node=1)
    config.slurm = replace(config.slurm, charge=2.5, inference=with_gpu, training=with_gpu)
    found = budget(config, Known(trainer_tokens_per_s=1.0))
    hours = 3 * found.times.total_s / 3600
    assert hours > 1
    said = f"{hours:,.1f} node-hours of 3 nodes, charged as {2.5 * hours:,.1f}, plus the start of its components"
    assert said in "\n".join(lines(found))


def test_an_embedding_of_its_own_costs_sixteen_bytes_a_value_over_all_ranks(config: Config):
    def kept(found: dict[str, int]) -> tuple[int, int]:
        return found["weights, gradients and optimizer"], found["target's embedding and head"]

    of_ranks, of_target = kept(budget(config, Known()).rank_bytes)
    config.draft = replace(config.draft, train_embedding=True)
    assert kept(budget(config, Known()).rank_bytes) == (of_ranks + 16 * 512 * 64, of_target - 2 * 512 * 64)


def test_a_head_that_is_not_trained_costs_four_bytes_a_weight_instead_of_sixteen(config: Config):
    name = "weights, gradients and optimizer"
    before = budget(config, Known()).rank_bytes
    config.draft = replace(config.draft, train_head=False)
    after = budget(config, Known()).rank_bytes
    assert after[name] == before[name] - 12 * 256 * 64
    assert after["sums"] == before["sums"] - 4 * 256 * 64


def test_a_run_that_tells_nothing_is_refused(config: Config, tmp_path: Path):
    with pytest.raises(UserError, match="is not a run directory"):
        budget(config, Known(like=tmp_path))

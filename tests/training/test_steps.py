"""Facts about a step that are known beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from specbatch.config import Config, Data, Run, Target
from specbatch.drafts.eagle3.algorithm import Eagle3
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.plan import Plan
from specbatch.training.feed.steps import Steps

TTT_STEPS = 3


@dataclass(frozen=True)
class PaperSample:
    input_ids: np.ndarray
    loss_mask: np.ndarray


class PaperCorpus:
    """Samples of 4 to 9 tokens; the first third of each is the prompt."""

    def __init__(self, samples: int) -> None:
        self.lengths = np.array([4 + i % 6 for i in range(samples)])

    def sample(self, i: int) -> PaperSample:
        length = int(self.lengths[i])
        return PaperSample(np.arange(length, dtype=np.int32), np.arange(length) >= length // 3)


def algorithm(steps: int = TTT_STEPS) -> Eagle3:
    """EAGLE-3, of which only what it says of masks is asked: that does not depend on the target."""
    draft = Eagle3Draft(ttt_steps=steps, step_decay=0.5)
    config = Config(run=Run(dir="run"), target=Target(path="t"), data=Data(train=["a.jsonl"]), draft=draft)
    return Eagle3(config, None)  # type: ignore[arg-type]


def steps_of(rank: int, ranks: int, samples: int = 21) -> Steps:
    corpus = PaperCorpus(samples)
    plan = Plan(corpus.lengths, seed=0, epochs=1, tokens_per_pack=12, packs_per_step=4)
    return Steps(plan, corpus, algorithm(), rank=rank, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_packs_of_a_step_and_agree_on_all_else(ranks: int) -> None:
    all_ranks = [steps_of(rank, ranks).facts(2) for rank in range(ranks)]
    alone = steps_of(0, 1).facts(2)
    assert sorted(pack.id for facts in all_ranks for pack in facts.packs) == sorted(pack.id for pack in alone.packs)
    for facts in all_ranks:
        assert facts.tokens == alone.tokens
        assert facts.counts.tolist() == alone.counts.tolist()
        assert facts.weights.tolist() == alone.weights.tolist()
        assert len(facts.packs) == 4 // ranks


def test_weights_make_sums_over_all_packs_a_mean_for_each_unrolled_step() -> None:
    facts = steps_of(0, 1).facts(1)
    corpus = PaperCorpus(21)
    masks = [corpus.sample(sample).loss_mask for pack in facts.packs for sample in pack.samples]
    for k in range(TTT_STEPS):
        # Column i of step k learns token i + 2 + k: all from i + 1 to that one have to be loss tokens.
        count = sum(bool(mask[i + 1 : i + 3 + k].all()) for mask in masks for i in range(len(mask) - 2 - k))
        assert facts.counts[k] == count
        assert facts.weights[k] == pytest.approx(0.5**k / count)


def test_an_unrolled_step_with_nothing_to_learn_weighs_nothing() -> None:
    corpus = PaperCorpus(1)
    plan = Plan(corpus.lengths, seed=0, epochs=1, tokens_per_pack=12, packs_per_step=1)
    steps = Steps(plan, corpus, algorithm(5), rank=0, ranks=1)
    assert steps.facts(1).counts.tolist() == [2, 1, 0, 0, 0]
    assert steps.facts(1).weights.tolist() == [0.5, 0.5, 0, 0, 0]

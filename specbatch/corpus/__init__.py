"""Conversations become samples: tokens and a loss mask that is proved, once, and read by every process of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specbatch.corpus.first import try_first_rows
from specbatch.corpus.prepare import prepare
from specbatch.corpus.prepared import Corpus, Sample, attach, corpus_of, open_corpus
from specbatch.corpus.summary import Summary
from specbatch.corpus.tokenizer import load_tokenizer
from specbatch.corpus.vocabulary import draft_vocabulary
from specbatch.plan import Plan

if TYPE_CHECKING:
    from specbatch.config import Config

__all__ = [
    "Corpus",
    "Sample",
    "Summary",
    "attach",
    "corpus_of",
    "draft_vocabulary",
    "load_tokenizer",
    "make_plan",
    "open_corpus",
    "planned_steps",
    "prepare",
    "prompts",
    "try_first_rows",
]


def make_plan(config: Config, corpus: Corpus) -> Plan:
    """The plan of a run: the same in every process."""
    return Plan(
        corpus.lengths,
        seed=config.run.seed,
        epochs=config.training.epochs,
        tokens_per_pack=config.training.tokens_per_pack,
        packs_per_step=config.training.packs_per_step,
        heldout=corpus.heldout.lengths if corpus.heldout else None,
        heldout_packs=config.training.evaluate_packs if config.training.evaluate_interval_steps else 0,
    )


def planned_steps(config: Config, plan: Plan) -> int:
    """Optimizer steps that the run makes of its plan."""
    return min(plan.steps, config.training.max_steps or plan.steps)


def prompts(config: Config, heldout: Corpus | None) -> list[list[int]]:
    """The prompts of the evaluation: the first ``evaluate.prompts`` of the held-out data.

    Returns:
        Token ids of each conversation up to and with the generation prompt of its first assistant turn.
    """
    return heldout.prompts()[: config.evaluate.prompts] if heldout else []

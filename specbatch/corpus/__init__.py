"""Converts conversations to samples, tokens with a proved loss mask, once; every process of a run reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specbatch.corpus.first import FirstRows, left_to_do, try_first_rows
from specbatch.corpus.prepare import prepare
from specbatch.corpus.prepared import Corpus, Sample, attach, corpus_of, open_corpus
from specbatch.corpus.summary import Summary
from specbatch.corpus.tokenizer import load_tokenizer
from specbatch.corpus.vocabulary import draft_vocabulary
from specbatch.plan import PackPlan, Plan

if TYPE_CHECKING:
    from specbatch.config import Config

__all__ = [
    "Corpus",
    "FirstRows",
    "Sample",
    "Summary",
    "attach",
    "corpus_of",
    "draft_vocabulary",
    "left_to_do",
    "load_tokenizer",
    "make_plan",
    "open_corpus",
    "planned_steps",
    "prepare",
    "try_first_rows",
]


def make_plan(config: Config, corpus: Corpus) -> Plan:
    """Return the plan of a run, the same in every process."""
    return Plan(
        corpus.lengths,
        seed=config.run.seed,
        epochs=config.training.epochs,
        tokens_per_pack=config.training.tokens_per_pack,
        packs_per_step=config.training.packs_per_step,
        heldout=corpus.heldout.lengths if corpus.heldout else None,
        heldout_packs=config.training.evaluate_packs if config.training.evaluate_interval_steps else 0,
        weighted=list(zip(corpus.entry_sizes, config.data.weights, strict=True)) if config.data.weights else None,
    )


def planned_steps(config: Config, plan: PackPlan) -> int:
    """Return the number of optimizer steps that the run makes of its plan."""
    return min(plan.steps, config.training.max_steps or plan.steps)

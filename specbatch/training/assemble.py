"""The training of one rank: put together from the run directory, and run to the last snapshot."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specbatch.training import cpu  # isort: skip  # before any other module of torchtitan

from specbatch.config import Config, load_config
from specbatch.corpus import Corpus, make_plan, open_corpus, planned_steps
from specbatch.dispatch.client import Client
from specbatch.dispatch.rendezvous import wait_for
from specbatch.errors import RunError
from specbatch.rundir import RunDir
from specbatch.snapshot.folder import snapshots
from specbatch.snapshot.pace import Pace
from specbatch.target import TargetShape, capture_contract, fingerprint, lm_head, read_target
from specbatch.training.drafts import files, training
from specbatch.training.drafts.pack import Share
from specbatch.training.failures import failures
from specbatch.training.fetch import Prefetcher
from specbatch.training.heldout import HeldOut
from specbatch.training.model import model_spec
from specbatch.training.recorder import Recorder
from specbatch.training.settings import trainer_config
from specbatch.training.steps import Dealt, Steps
from specbatch.training.trainer import DraftTrainer, Surroundings
from specbatch.transfer.store import StoreClient

log = logging.getLogger(__name__)

DISPATCHER_DEADLINE_S = 60.0
"""A head that is silent for so long is given up, and training with it."""

RESTARTS_A_START = 1 << 16
"""More than torch's agent ever restarts its ranks: numbers of the ranks' generations start anew with each agent."""

OPTIMIZER_FACTS = (
    "learning_rate",
    "schedule",
    "decay_share",
    "warmup_steps",
    "min_learning_rate",
    "weight_decay",
    "betas",
    "max_grad_norm",
    "dtype",
)
"""Fields of the configuration's `training` that a resumed run must share: a snapshot's optimizer brings its own of some
of them, so that a changed one would be used in part, without a word."""


def train(run_dir: RunDir, attempt: int, starts: int) -> None:
    """Train until the last step, or until the dispatcher says stop. A snapshot is on disk then.

    Args:
        starts: how often this attempt's training was started before.

    Raises:
        UserError: the snapshots in the run directory are of another training.
        RunError: training can't go on.
    """
    config = load_config(run_dir.config)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    corpus = open_corpus(run_dir)
    plan, target = make_plan(config, corpus), read_target(config.target.path)
    last_step = planned_steps(config, plan)
    together = config.training.context_parallel
    algorithm = training(config.draft.algorithm)
    steps, share = steps_of_rank(config, plan, corpus, rank, ranks)
    contract = capture_contract(config, target)
    rendezvous = wait_for(run_dir.rendezvous(attempt), attempt, timeout_s=60.0)
    client = Client(rendezvous, deadline_s=DISPATCHER_DEADLINE_S)
    store = StoreClient(rendezvous, config.store, segment_bytes=int(config.store.bytes_per_rank))
    part = part_of(config) if together > 1 else None
    prefetcher = Prefetcher(
        client,
        store,
        rendezvous,
        rank=rank,
        steps=steps,
        corpus=corpus,
        contract=contract,
        tokens_per_pack=config.training.tokens_per_pack,
        ahead=config.training.prefetch_steps,
        last_step=last_step,
        device=cpu.local_device(),
        share=share,
        part=part,
    )
    heldout = None
    if plan.heldout:
        heldout = HeldOut(
            client,
            store,
            rendezvous,
            plan,
            rank=rank,
            ranks=ranks,
            corpus=corpus,
            contract=capture_contract(config, target),
            count=partial(algorithm.supervised_counts, ttt_steps=config.draft.ttt_steps),
            ttt_steps=config.draft.ttt_steps,
            step_decay=config.draft.step_decay,
            draft_tokens=config.evaluate.draft_tokens,
            target_head=lambda: lm_head(target),
            device=cpu.local_device(),
            share=share,
            part=part,
        )
    start = None
    if config.draft.init_from and not snapshots(run_dir.snapshots):
        start = files(config.draft.algorithm).read_published(config, target)
    settings = trainer_config(
        config,
        run_dir,
        model_spec(config, target, corpus, start),
        steps,
        corpus,
        last_step=last_step,
        facts=snapshot_facts(config, plan.fingerprint, target, corpus),
    )

    def tell(what: str, why: str) -> None:
        with contextlib.suppress(RunError):  # the head is gone or draining: others notice
            client.trouble(what, why)

    recorder = None
    if config.snapshot.record:
        recorder = Recorder(
            run_dir.recordings, keep=config.snapshot.record, rank=rank, ranks=ranks, share=share, tell=tell
        )
    trainer: DraftTrainer = settings.build(
        surroundings=Surroundings(
            client=client,
            prefetcher=prefetcher,
            steps=steps,
            segment=store.segment,
            segment_bytes=int(config.store.bytes_per_rank),
            generation=starts * RESTARTS_A_START + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            metrics=run_dir.metrics,
            superseded=partial(run_dir.superseded, attempt),
            step_decay=config.draft.step_decay,
            calibrate=start is None,
            skip_not_finite=config.training.not_finite == "skip",
            heldout=heldout,
            evaluate_steps=config.training.evaluate_interval_steps or 1,
            share=share,
            pace=_pace(config, run_dir, attempt),
            observer=recorder,
        )
    )
    trainer.checkpointer.tell = tell
    if recorder is not None:
        trainer.checkpointer.make_room = recorder.give_way
    trainer.train()
    trainer.close()
    if recorder is not None:
        recorder.close()
    log.info("left step=%d of=%d why=%s", trainer.step, last_step, trainer.stopped or "all steps are trained")
    dist.destroy_process_group()


def steps_of_rank(config: Config, plan: Dealt, corpus: Corpus, rank: int, ranks: int) -> tuple[Steps, Share]:
    """What a rank knows of each step, and which part of its packs it trains."""
    together = config.training.context_parallel
    steps = Steps(
        plan,
        corpus,
        partial(training(config.draft.algorithm).supervised_counts, ttt_steps=config.draft.ttt_steps),
        step_decay=config.draft.step_decay,
        rank=rank // together,
        ranks=ranks // together,
    )
    return steps, Share(rank % together, together)


def part_of(config: Config) -> Callable[[Tensor, tuple[int, ...], Share], dict[str, Tensor]]:
    """The rows of each tensor that a share of a pack has, from its loss mask and lengths."""
    return partial(training(config.draft.algorithm).part_of, ttt_steps=config.draft.ttt_steps)


def _pace(config: Config, run_dir: RunDir, attempt: int) -> Pace | None:
    interval = config.snapshot.interval
    if interval.steps is not None:
        return None
    count, ran_s = failures(run_dir, attempt)
    count += int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return Pace(interval.seconds, failures=count, ran_s=ran_s)


def snapshot_facts(config: Config, plan: dict[str, Any], target: TargetShape, corpus: Corpus) -> dict[str, object]:
    """What must be the same where training goes on: everything that the data position and the weights mean.

    Args:
        plan: its fingerprint.
    """
    draft = config.draft
    return {
        "plan": plan,
        "corpus": corpus.fingerprint,
        "target": fingerprint(target),
        "draft": {
            "algorithm": draft.algorithm,
            "ttt_steps": draft.ttt_steps,
            "step_decay": draft.step_decay,
            "vocab_size": draft.vocab_size,
            "aux_layers": list(capture_contract(config, target).aux_layers),
            "intermediate_size": draft.intermediate_size or target.intermediate,
            "train_head": draft.train_head,
            "train_embedding": draft.train_embedding,
        },
        "optimizer": {name: getattr(config.training, name) for name in OPTIMIZER_FACTS},
    }

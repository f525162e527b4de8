"""Recorded steps in the real trainer, with no engine, no store and no dispatcher: again, or for a new draft."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from specbatch.training import cpu  # isort: skip  # before any other module of torchtitan

from specbatch.config import Config, load_config
from specbatch.corpus import Corpus, make_plan, open_corpus, planned_steps
from specbatch.rundir import RunDir
from specbatch.snapshot.folder import snapshots
from specbatch.snapshot.pace import Pace
from specbatch.target import TargetShape, capture_contract, read_target
from specbatch.training.assemble import part_of, snapshot_facts, steps_of_rank
from specbatch.training.drafts import files
from specbatch.training.model import model_spec
from specbatch.training.replay import Alone, Recordings, RepeatedPlan, Verdicts
from specbatch.training.replay_rank import Order
from specbatch.training.settings import trainer_config
from specbatch.training.sources import Observer
from specbatch.training.steps import Dealt
from specbatch.training.trainer import DraftTrainer, Surroundings

log = logging.getLogger(__name__)


def repeat(order: Order) -> None:
    """Train recorded steps again from the snapshot before them, and say of each what came out. The run is not changed.

    Raises:
        UserError: the snapshot is of another training than the run's configuration.
        RunError: a snapshot or recording is missing or damaged.
    """
    run_dir = RunDir(Path(order.run))
    config = load_config(run_dir.config)
    config.training.ranks, config.training.context_parallel = int(os.environ["WORLD_SIZE"]), order.together
    corpus = open_corpus(run_dir)
    plan, start = make_plan(config, corpus), order.first - 1
    job = _Job(config, run_dir, corpus, plan, last_step=planned_steps(config, plan), plan_facts=plan.fingerprint)
    source = job.source(run_dir, None)
    verdicts = Verdicts(source, Path(order.verdicts) if job.rank == 0 else None)
    settings = job.settings(first=start == 0)
    settings.checkpoint.load_only = True
    settings.checkpoint.enable, settings.checkpoint.load_step = start > 0, start
    job.train(settings, source, until=start + order.count, metrics=None, observer=verdicts, calibrate=start == 0)


def train_anew(order: Order) -> None:
    """Train a draft in a run directory of its own on the recorded steps of another run; goes on where that stands, and
    stops with a snapshot when it is asked to.

    Raises:
        UserError: the directory has snapshots of another training.
        RunError: a recording is missing or damaged.
    """
    recorded, run_dir = RunDir(Path(order.run)), RunDir(Path(order.out))
    config = load_config(run_dir.config)
    corpus = open_corpus(recorded)
    planned = make_plan(load_config(recorded.config), corpus)
    plan = RepeatedPlan(planned, first=order.first, count=order.count, epochs=config.training.epochs)
    job = _Job(config, run_dir, corpus, plan, last_step=order.last_step, plan_facts=plan.fingerprint)
    source = job.source(recorded, plan)
    new = not snapshots(run_dir.snapshots)
    job.train(
        job.settings(first=new), source, until=order.last_step, metrics=run_dir.metrics, observer=None, calibrate=new,
        asked=Path(order.stop).exists, superseded=partial(run_dir.superseded, order.attempt),
    )  # fmt: skip


class _Job:
    """One rank's share of the work."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        corpus: Corpus,
        plan: Dealt,
        *,
        last_step: int,
        plan_facts: dict[str, Any],
    ) -> None:
        self.config, self.run_dir, self.corpus = config, run_dir, corpus
        self.last_step, self.plan_facts = last_step, plan_facts
        if config.training.threads is not None:
            torch.set_num_threads(config.training.threads)
        self.rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.target: TargetShape = read_target(config.target.path)
        self.steps, self.share = steps_of_rank(config, plan, corpus, self.rank, ranks)
        self._published = False

    def source(self, recorded: RunDir, plan: RepeatedPlan | None) -> Recordings:
        """The packs of this rank."""
        return Recordings(
            recorded.recordings, self.steps, plan=plan, share=self.share,
            had=part_of(load_config(recorded.config)), has=part_of(self.config),
            contract=capture_contract(self.config, self.target), device=cpu.local_device(),
        )  # fmt: skip

    def settings(self, *, first: bool) -> DraftTrainer.Config:
        """What torchtitan trains with.

        Args:
            first: whether the first weights are needed.
        """
        draft = self.config.draft
        start = files(draft.algorithm).read_published(self.config, self.target) if first and draft.init_from else None
        self._published = start is not None
        return trainer_config(
            self.config, self.run_dir, model_spec(self.config, self.target, self.corpus, start), self.steps,
            self.corpus, last_step=self.last_step,
            facts=snapshot_facts(self.config, self.plan_facts, self.target, self.corpus),
        )  # fmt: skip

    def train(
        self,
        settings: DraftTrainer.Config,
        source: Recordings,
        *,
        until: int,
        metrics: Path | None,
        observer: Observer | None,
        calibrate: bool,
        asked: Callable[[], bool] | None = None,
        superseded: Callable[[], bool] | None = None,
    ) -> None:
        """Train, with the snapshots that the settings ask for.

        Args:
            asked: whether somebody asked to stop.
        """
        interval = self.config.snapshot.interval
        trainer: DraftTrainer = settings.build(
            surroundings=Surroundings(
                client=Alone(until, asked, cpu.local_device()),
                prefetcher=source,
                steps=self.steps,
                segment="",
                segment_bytes=0,
                generation=0,
                metrics=metrics,
                step_decay=self.config.draft.step_decay,
                calibrate=calibrate and not self._published,
                heldout=None,
                evaluate_steps=1,
                share=self.share,
                skip_not_finite=self.config.training.not_finite == "skip",
                pace=None if interval.steps else Pace(interval.seconds),
                observer=observer,
                superseded=superseded,
            )
        )
        trainer.train()
        trainer.close()
        log.info("left step=%d", trainer.step)
        dist.destroy_process_group()

"""Trains recorded steps again in the real trainer, without engines, store and dispatcher."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from specbatch.config import load_config
from specbatch.corpus import make_plan, open_corpus
from specbatch.rundir import RunDir
from specbatch.training.assemble import RankJob
from specbatch.training.replay import Alone, Verdicts
from specbatch.training.replay_rank import Order
from specbatch.training.trainer import DraftTrainer

log = logging.getLogger(__name__)


def repeat(order: Order) -> None:
    """Train recorded steps again from the snapshot before them, and report each result. The run is not changed.

    Raises:
        UserError: the snapshot belongs to another training than the run's configuration.
        RunError: a snapshot or recording is missing or damaged.
    """
    run_dir, start = RunDir(Path(order.run)), order.first - 1
    config, corpus = load_config(run_dir.config), open_corpus(run_dir)
    config.training.ranks, config.training.context_parallel = int(os.environ["WORLD_SIZE"]), order.together
    job = RankJob(config, run_dir, corpus, make_plan(config, corpus), new=start == 0)
    packs = job.recordings(run_dir, None, trained=lambda step: None)
    settings = job.settings()
    settings.checkpoint.load_only = True
    settings.checkpoint.enable, settings.checkpoint.load_step = start > 0, start
    verdicts = Verdicts(packs, Path(order.verdicts) if job.rank == 0 else None)
    around = replace(job.surroundings(Alone(start + order.count), packs), observer=verdicts)
    trainer: DraftTrainer = settings.build(surroundings=around)
    trainer.train()
    trainer.close()
    log.info("left step=%d", trainer.step)
    dist.destroy_process_group()

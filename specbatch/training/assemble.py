"""Assembles the training of one rank from the run directory, and runs it to the last snapshot."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from specbatch.training import cpu  # isort: skip  # before any other module of torchtitan

from specbatch.config import Config, load_config
from specbatch.corpus import Corpus, open_corpus, planned_steps
from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import ConnectionFile, wait_for
from specbatch.drafts.base import algorithm_of
from specbatch.drafts.pack import ContextShard
from specbatch.errors import RunError
from specbatch.plan import PackPlan
from specbatch.recorded_plan import RecordedPlan, plan_of_run
from specbatch.rundir import RunDir
from specbatch.snapshot.interval import SnapshotInterval
from specbatch.snapshot.manifest import snapshots
from specbatch.target import fingerprint, head_bias, lm_head, read_target
from specbatch.training.feed.prefetcher import Prefetcher
from specbatch.training.feed.steps import Steps
from specbatch.training.heldout import HeldOut
from specbatch.training.model import model_spec
from specbatch.training.observers.recorder import Recorder
from specbatch.training.observers.trackers import Trackers
from specbatch.training.process.failures import failures
from specbatch.training.protocols import Conductor, PackSource
from specbatch.training.replay import Recordings
from specbatch.training.settings import trainer_config
from specbatch.training.trainer import DraftTrainer, Surroundings
from specbatch.transfer.store import StoreClient, store_of

log = logging.getLogger(__name__)

DISPATCHER_DEADLINE_S = 60.0
"""Seconds without an answer of the head after which training ends."""

RESTARTS_A_START = 1 << 16
"""Generations that each start of the agent has for itself: more than torch's agent ever restarts its ranks."""

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
"""Fields of the configuration's `training` that a resumed run must share. The optimizer state of a snapshot contains
some of them, so a change would silently take effect in part."""


def train(run_dir: RunDir, attempt: int, starts: int) -> None:
    """Train until the last step, or until the dispatcher stops it; a snapshot is on disk when it returns.

    Args:
        starts: number of earlier starts of this attempt's training.

    Raises:
        UserError: the snapshots in the run directory belong to another training.
        RunError: training can't continue.
    """
    config, corpus = load_config(run_dir.config), open_corpus(run_dir)
    job = RankJob(config, run_dir, corpus, plan_of_run(run_dir, config, corpus), new=not snapshots(run_dir.snapshots))
    rendezvous = wait_for(run_dir.rendezvous(attempt), attempt, 60.0, "packs")
    client = Client(rendezvous, deadline_s=DISPATCHER_DEADLINE_S)
    if isinstance(job.plan, RecordedPlan):
        packs = job.recordings(RunDir(Path(job.plan.source.run)), job.plan, trained=partial(client.trained, job.rank))
        around = job.surroundings(client, packs)
    else:
        around = _captured(job, client, rendezvous)

    def tell(what: str, why: str) -> None:
        with contextlib.suppress(RunError):  # the head is gone or draining, which others notice
            client.trouble(what, why)

    trackers = trackers_of(config, run_dir, job.rank, tell)
    recorder = None
    if config.snapshot.record:
        recorder = Recorder(
            run_dir.recordings, keep=config.snapshot.record, rank=job.rank, ranks=job.ranks, share=job.share, tell=tell
        )
    around = replace(
        around,
        generation=starts * RESTARTS_A_START + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        metrics=run_dir.metrics,
        trackers=trackers,
        superseded=partial(run_dir.superseded, attempt),
        pace=_pace(config, run_dir, attempt),
        observer=recorder,
    )
    trainer: DraftTrainer = job.settings().build(surroundings=around)
    trainer.checkpointer.tell = tell
    if recorder is not None:
        trainer.checkpointer.make_room = recorder.give_way
    with contextlib.closing(trackers) if trackers else contextlib.nullcontext():
        trainer.train()
        trainer.close()
    if recorder is not None:
        recorder.close()
    log.info("left step=%d of=%d why=%s", trainer.step, job.last_step, trainer.stopped or "all steps are trained")
    dist.destroy_process_group()


class RankJob:
    """The training of one rank, independent of where its packs come from.

    Args:
        new: whether the draft's first weights are needed.
    """

    def __init__(self, config: Config, run_dir: RunDir, corpus: Corpus, plan: PackPlan, *, new: bool) -> None:
        if config.training.threads is not None:
            torch.set_num_threads(config.training.threads)
        self.config, self.run_dir, self.corpus, self.plan = config, run_dir, corpus, plan
        self.last_step = planned_steps(config, plan)
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.algorithm = algorithm_of(config, read_target(config.target.path))
        together = config.training.context_parallel
        self.steps = Steps(plan, corpus, self.algorithm, rank=self.rank // together, ranks=self.ranks // together)
        self.share = ContextShard(self.rank % together, together)
        self._published = self.algorithm.files.read_published() if new and config.draft.init_from else None

    def recordings(self, recorded: RunDir, plan: RecordedPlan | None, trained: Callable[[int], object]) -> Recordings:
        """Return this rank's packs as a run recorded them. Arguments as for `Recordings`."""
        return Recordings(
            recorded.recordings, self.steps, plan=plan, trained=trained, share=self.share,
            had=algorithm_of(load_config(recorded.config), self.algorithm.target).share_rows,
            has=self.algorithm.share_rows, contract=self.algorithm.contract, device=cpu.local_device(),
        )  # fmt: skip

    def settings(self) -> DraftTrainer.Config:
        """Return torchtitan's configuration."""
        return trainer_config(
            self.config,
            self.run_dir,
            model_spec(self.config, self.algorithm, self.corpus, self._published),
            self.steps,
            self.corpus,
            last_step=self.last_step,
            facts=self._facts(),
        )

    def surroundings(self, client: Conductor, packs: PackSource) -> Surroundings:
        """Return the part of the trainer's surroundings that does not depend on where packs come from."""
        return Surroundings(
            client=client,
            prefetcher=packs,
            steps=self.steps,
            share=self.share,
            terms=self.algorithm.terms,
            calibrate=self._published is None,
            skip_not_finite=self.config.training.not_finite == "skip",
            evaluate_steps=self.config.training.evaluate_interval_steps or 1,
        )

    def _facts(self) -> dict[str, object]:
        """Return what a resumed training must share: all that gives the data position and the weights their meaning."""
        return {
            "plan": self.plan.fingerprint,
            "corpus": self.corpus.fingerprint,
            "target": fingerprint(self.algorithm.target),
            "draft": self.algorithm.facts(),
            "optimizer": {name: getattr(self.config.training, name) for name in OPTIMIZER_FACTS},
        }


def _captured(job: RankJob, client: Client, rendezvous: ConnectionFile) -> Surroundings:
    """Return the surroundings of a rank that gets its packs, and its held-out packs, from engines through the store."""
    config, segment_bytes = job.config, int(job.config.store.bytes_per_rank)
    store = StoreClient(rendezvous, store_of(config, "training"), segment_bytes=segment_bytes)
    part = job.algorithm.share_rows if job.share.ranks > 1 else None
    prefetcher = Prefetcher(
        client,
        store,
        rendezvous,
        rank=job.rank,
        steps=job.steps,
        corpus=job.corpus,
        contract=job.algorithm.contract,
        tokens_per_pack=config.training.tokens_per_pack,
        ahead=config.training.prefetch_steps,
        last_step=job.last_step,
        device=cpu.local_device(),
        share=job.share,
        part=part,
    )
    heldout = None
    if job.plan.heldout:
        target = job.algorithm.target
        heldout = HeldOut(
            client,
            store,
            rendezvous,
            job.plan,
            rank=job.rank,
            ranks=job.ranks,
            corpus=job.corpus,
            algorithm=job.algorithm,
            draft_tokens=config.evaluate.draft_tokens,
            target_head=lambda: (lm_head(target), head_bias(target)),
            device=cpu.local_device(),
            share=job.share,
            part=part,
        )
    around = job.surroundings(client, prefetcher)
    return replace(around, segment=store.segment, segment_bytes=segment_bytes, heldout=heldout)


def trackers_of(config: Config, run_dir: RunDir, rank: int, tell: Callable[[str, str], None]) -> Trackers | None:
    """Return the trackers that ``training.metrics`` names, on the rank that reports steps; None on others."""
    if rank or not config.training.metrics:
        return None
    shown = asdict(config)
    # It has lines of shell code, which may contain keys.
    del shown["slurm"]
    return Trackers(config.training.metrics, run_dir, name=config.run.name, config=shown, tell=tell)


def _pace(config: Config, run_dir: RunDir, attempt: int) -> SnapshotInterval | None:
    interval = config.snapshot.interval
    if interval.steps is not None:
        return None
    count, ran_s = failures(run_dir, attempt)
    count += int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return SnapshotInterval(interval.seconds, failures=count, ran_s=ran_s)

"""One of the doctor's trainer ranks: ``python -m specbatch.doctor.rank ROOT``, started by torch's agent.

It checks the attention, meets the other ranks, trains the trial's steps on random hidden states in the real trainer,
and reads the resulting snapshot. Its findings are in ``findings/rank-N.json``.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specbatch.training import cpu  # isort: skip  # before any other module of torchtitan

from specbatch.config import Config, load_config
from specbatch.corpus import make_plan, open_corpus
from specbatch.doctor.attention import attention
from specbatch.doctor.finding import Finding, failed, guarded, not_checked, write_findings
from specbatch.doctor.trial import ATTEMPT, STEPS
from specbatch.drafts.base import algorithm_of
from specbatch.drafts.pack import PackTensors
from specbatch.parent_death import die_with_parent
from specbatch.plan import Pack
from specbatch.planning.rates import ASSUMED_GPU, assumed_rank
from specbatch.planning.work import PlannedWork, work_of
from specbatch.process_log import open_log
from specbatch.rundir import RunDir
from specbatch.snapshot.inspect import inspect_snapshot
from specbatch.snapshot.manifest import snapshot_path
from specbatch.target import read_target
from specbatch.training.assemble import RankJob
from specbatch.training.feed.buffers import PackRows
from specbatch.training.replay import Alone
from specbatch.training.trainer import DraftTrainer
from specbatch.units import bytes_text

log = logging.getLogger(__name__)
REDUCED = 64 << 20
"""Bytes of the measured all-reduce."""
REDUCTIONS = 5
_NOT_MET = (
    "set slurm.interface to one over which the training nodes reach each other, and open the ports of gloo and NCCL "
    "between them; `NCCL_DEBUG=INFO` in slurm.training.setup says more"
)


class _WrongSum(RuntimeError):
    """Ranks add up to something else."""


def main(root: Path) -> None:
    """Run all checks of this rank."""
    run_dir, rank = RunDir(root), int(os.environ["RANK"])
    open_log(run_dir.component_log(ATTEMPT, "training", rank), f"training-{rank}")
    die_with_parent()
    config, findings = load_config(run_dir.config), []
    device = cpu.local_device()
    findings += guarded("attention", lambda: attention(*_heads(config, run_dir), device))
    findings += guarded("training step", lambda: train(config, run_dir, device))
    if rank == 0:
        findings += guarded("snapshot", lambda: snapshot(config, run_dir))
    for finding in findings:
        log.info("finding what=%s verdict=%s found=%s", finding.what, finding.verdict, finding.found)
    write_findings(root / "findings" / f"rank-{rank}.json", findings)


def _heads(config: Config, run_dir: RunDir) -> tuple[int, int, int]:
    """Return the draft's heads, key heads and their width; the target's if the algorithm does not say them."""
    target = read_target(config.target.path)
    settings = algorithm_of(config, target).settings(open_corpus(run_dir))
    names = (("num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads"), ("head_dim", "head_dim"))
    heads, kv_heads, width = (getattr(settings, own, getattr(target, of_target)) for own, of_target in names)
    return heads, kv_heads, width


class RankMeasurements:
    """Observes and measures the ranks (`specbatch.training.protocols.Observer`)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reduced: float | None = None
        """Bytes per second and rank of an all-reduce; None for a single rank."""
        self.lines: list[dict[str, Any]] = []
        self.backend, self.ranks = "", 1

    def start(self, trained: int) -> None:
        """Check and measure an all-reduce, once the ranks have met."""
        self.backend, self.ranks = dist.get_backend(), dist.get_world_size()
        if self.ranks == 1:
            return
        values = torch.full((REDUCED // 4,), 1.0, device=self._device)
        dist.all_reduce(values)
        expected, begun = self.ranks, time.perf_counter()
        for _ in range(REDUCTIONS):
            values.fill_(1.0)
            dist.all_reduce(values)
        right = bool((values == expected).all().item())
        if not right:
            raise _WrongSum(f"ones over {self.ranks} ranks add up to {values.unique().tolist()[:3]}")
        self.reduced = REDUCED * REDUCTIONS / (time.perf_counter() - begun)

    def pack(self, pack: Pack, tensors: PackTensors, result: Tensor, void: dict[str, str]) -> None:
        """Do nothing."""

    def step(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


class RandomStates:
    """Packs of random hidden states (`specbatch.training.protocols.PackSource`)."""

    def __init__(self, job: RankJob, device: torch.device) -> None:
        self._job, self._device = job, device

    def start(self, trained: int) -> None:
        """Do nothing: packs are not fetched ahead."""

    def take(self, step: int, index: int) -> PackTensors:
        """Return a pack of this rank, or its share of it."""
        job = self._job
        contract = job.algorithm.contract
        found = PackRows.of(job.steps.facts(step).packs[index], job.corpus, contract)
        counts = {name: found.count(name) for name in contract.widths}
        if job.share.ranks > 1:
            part = job.algorithm.share_rows(torch.from_numpy(found.loss_mask), found.lengths, found.samples, job.share)
            counts = {name: len(part[name]) for name in counts}
        rows = {
            name: torch.randn(counts[name], width, device=self._device, dtype=torch.bfloat16)
            for name, width in contract.widths.items()
        }
        return found.tensors(rows, self._device, job.share)

    def release(self, step: int, index: int) -> None:
        """Do nothing: the memory is freed with its last reference."""

    def give_up(self, step: int, index: int, why: str) -> None:
        raise AssertionError(why)

    def take_waited_s(self) -> float:
        return 0.0

    def void(self, step: int) -> dict[str, str]:
        return {}

    def finish(self, step: int) -> None:
        """Do nothing: nothing was stored."""


def train(config: Config, run_dir: RunDir, device: torch.device) -> Iterator[Finding]:
    """Train the trial's steps in a run's trainer."""
    corpus = open_corpus(run_dir)
    plan = make_plan(config, corpus)
    job = RankJob(config, run_dir, corpus, plan, new=True)
    watch = RankMeasurements(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    around = job.surroundings(Alone(STEPS), RandomStates(job, device))
    surroundings = replace(around, metrics=run_dir.metrics, observer=watch)
    try:
        trainer: DraftTrainer = job.settings().build(surroundings=surroundings)
        trainer.train()
    except RuntimeError as error:
        if dist.is_initialized() and not isinstance(error, dist.DistError | _WrongSum):
            raise
        why = str(error) if isinstance(error, _WrongSum) else f"ranks do not meet: {error}"
        yield failed("all-reduce", why.splitlines()[0], "ranks meet and add up", _NOT_MET)
        yield not_checked("training step", "see all-reduce")
        return
    trainer.close()
    dist.destroy_process_group()
    if watch.reduced is not None and job.rank == 0:
        found = f"{watch.reduced / 1e9:.2f} GB/s over {watch.ranks} ranks by {watch.backend}, correct sums"
        yield Finding("all-reduce", found, "ranks meet and add up", rates={"all_reduce": watch.reduced})
    if job.rank == 0:
        yield _speed(config, work_of(config, corpus), watch.lines, gpu=device.type == "cuda")
    planned = sum(job.algorithm.memory().values())
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        verdict = "warning" if peak > 1.1 * planned else "ok"
        remedy = "the plan is too low: leave more of the GPU free, and report it" if verdict == "warning" else ""
        found, expected = bytes_text(peak), f"{bytes_text(planned)} by the plan"
        yield Finding("memory of a rank", found, expected, remedy, verdict)  # type: ignore[arg-type]
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        yield Finding("memory of a rank", f"{bytes_text(peak)}, torch itself included", "not planned on CPUs")


def _speed(config: Config, work: PlannedWork, lines: list[dict[str, Any]], *, gpu: bool) -> Finding:
    """Return the speed of the steps after the first."""
    counted = [line for line in lines if line["step"] > 1]
    seconds = sum(line["seconds"] for line in counted)
    tokens = sum(line["tokens"] for line in counted)
    flops = sum(work.trainer_flops_of(work.plan.packs(line["step"])) for line in counted)
    rate = flops / seconds / work.ranks
    kind = config.training.gpu or ASSUMED_GPU
    assumed = assumed_rank(kind, peak_tflops=None if config.training.gpu else config.slurm.gpu_tflops)
    losses = [line["loss"] for line in lines]
    what, found = "training step", f"{tokens / seconds:,.0f} tokens/s of all ranks, full packs"
    if None in losses:
        return failed(what, f"the loss of random states is not a number: {losses}", "a number", "report it")
    expected = f"{tokens / seconds * assumed.flops_per_s / rate:,.0f} tokens/s ({assumed.source})" if gpu else ""
    return Finding(what, found, expected, rates={"rank_flops_per_s": rate, "trainer_tokens_per_s": tokens / seconds})


def snapshot(config: Config, run_dir: RunDir) -> Finding:
    """Check that the trial's snapshot is complete, and that there is room for the run's."""
    path, what = snapshot_path(run_dir.snapshots, STEPS), "snapshot"
    if not path.is_dir():
        return not_checked(what, "the training step left none: see there")
    inspected = inspect_snapshot(path)
    if inspected.damage:
        return failed(
            what, f"{path}: {inspected.damage[0]}", "written and read back", "use a run.dir on another file system"
        )
    size = inspected.bytes
    free, wanted = shutil.disk_usage(run_dir.root).free, (config.snapshot.keep + 2) * size
    found = f"{bytes_text(size)} written and read back; {bytes_text(free)} free"
    expected = f"{bytes_text(wanted)} free, for {config.snapshot.keep + 2}"
    if free < wanted:
        return failed(what, found, expected, "make room, or set a smaller snapshot.keep or another run.dir")
    return Finding(what, found, expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""torchtitan's trainer, with three differences: packs are taken one at a time as they are trained, the dispatcher
decides whether a step may begin, and every step is reported.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.trainer import Trainer

from specbatch.dispatch.messages import Phase
from specbatch.drafts.base import Term
from specbatch.drafts.pack import ContextShard, PackTensors
from specbatch.errors import RunError
from specbatch.evaluation.history import best_evaluation, best_step, merit
from specbatch.snapshot.interval import SnapshotInterval
from specbatch.training.feed.dataloader import MicroBatch
from specbatch.training.feed.device_copy import StepWeights
from specbatch.training.feed.steps import StepFacts, Steps
from specbatch.training.heldout import HeldOut
from specbatch.training.metrics import DraftLoss, StepSums, gather, metrics_line
from specbatch.training.observers.metrics_file import MetricsFile
from specbatch.training.observers.trackers import Trackers
from specbatch.training.protocols import Conductor, Observer, PackSource

log = logging.getLogger(__name__)


class NotFiniteError(RunError):
    """A step gave a loss or gradient that is not finite; it would do so again after a restart."""


@dataclass(frozen=True)
class Surroundings:
    """The objects that a rank's trainer is connected to."""

    client: Conductor
    prefetcher: PackSource
    steps: Steps
    share: ContextShard
    """Which part of its packs this rank trains."""
    terms: tuple[Term, ...]
    calibrate: bool
    """Whether the draft is new, and has to be calibrated to the target's states."""
    skip_not_finite: bool
    """Whether a step with a loss or gradient that is not finite is skipped, instead of ending the run."""
    evaluate_steps: int
    """Steps between two evaluations during training; the last step is evaluated in any case."""
    heldout: HeldOut | None = None
    """The packs for these evaluations; None if there are none."""
    segment: str = ""
    """Name of the memory segment that this rank lends to the store."""
    segment_bytes: int = 0
    generation: int = 0
    """Number of the ranks' start within the attempt."""
    metrics: Path | None = None
    """File that steps are reported to; None if they are not reported."""
    pace: SnapshotInterval | None = None
    """Decides when snapshots are due; None if they are due every fixed number of steps."""
    observer: Observer | None = None
    """Is called with each trained pack and step."""
    trackers: Trackers | None = None
    """Receive what is written to ``metrics``."""
    superseded: Callable[[], bool] | None = None
    """Returns whether a later attempt has begun; None if there are no attempts."""


class DraftTrainer(Trainer):
    """One rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    loss_fn: DraftLoss

    def __init__(self, config: Config, *, surroundings: Surroundings) -> None:
        super().__init__(config)
        self._around = surroundings
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._joined = False
        self._first = True
        self._metrics: MetricsFile | None = None
        self._sums: StepSums | None = None
        self._step_ended = 0.0
        self._waited_s = 0.0
        self._last_to_report = False
        self._skipped = ""
        """Why the current step is skipped; empty if it is not."""
        self._best: dict[str, Any] | None = None
        self._pack: PackTensors | None = None
        self._weights = StepWeights(surroundings.steps, self.device)
        self.stopped: str | None = None
        """Why training ended before its last step; None if it did not."""

    def should_continue_training(self) -> bool:
        """Ask the dispatcher whether the next step may begin. If not, save a snapshot and return false."""
        if not self._joined:
            self._join()
        if not super().should_continue_training():
            self._report_last()
            return False
        begun = time.perf_counter()
        while True:
            answer = self._around.client.begin(self._rank, self.step + 1)
            if answer.go:
                if self._first:
                    if self._around.heldout is not None:
                        self._around.heldout.fetch(self._group())
                    # The time before belongs to the start of the engines, not to this step.
                    self._first, self._step_ended = False, time.perf_counter()
                else:
                    self._waited_s += time.perf_counter() - begun
                if self.step == 0 and self._around.calibrate:
                    self._calibrate()
                return True
            if answer.phase is Phase.STOP:
                break
        log.info("stopping step=%d why=%s", self.step, answer.why)
        self.stopped = answer.why or "asked to stop"
        if self.step:
            self.checkpointer.save(self.step, last_step=True)
        return False

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Any], Tensor]]) -> None:
        """Train a step, report it, and release its packs."""
        self.loss_fn.packs.clear()
        super().train_step(data_iterator)
        sums, facts = self._sums, self._around.steps.facts(self.step)
        assert sums is not None
        grad_norm = self.metrics_processor.grad_norm
        if not math.isfinite(grad_norm):
            raise NotFiniteError(f"the gradient of step {self.step} is {grad_norm}; {self._samples(facts)}")
        seconds = time.perf_counter() - self._step_ended
        evaluation = self._evaluate()
        line = metrics_line(
            facts, sums, terms=self._around.terms, grad_norm=grad_norm,
            learning_rate=self.metrics_processor.learning_rate, seconds=seconds,
            snapshot_s=self.checkpointer.take_blocked_s(), evaluation=evaluation, skipped=self._skipped,
        )  # fmt: skip
        if self._metrics is not None:
            self._metrics.write(line)
        self.metrics_processor.logger.log(line, self.step)
        if self._around.observer is not None:
            self._around.observer.step(line)
        if sums.snapshot_due or self._is_best(evaluation):
            self.checkpointer.wanted = self.step
        self._step_ended = time.perf_counter()
        if self.step < self.config.training.steps:
            self._around.prefetcher.finish(self.step)
        else:
            self._last_to_report = True

    def post_dataloading_process(
        self, input_dict: dict[str, Any], labels: Tensor
    ) -> tuple[Any, Tensor, dict[str, Any]]:
        """Replace the `MicroBatch` by its pack."""
        turn: MicroBatch = input_dict["input"]
        self._pack = pack = self._take(turn.step, turn.index)
        self.ntokens_seen += turn.tokens // self._around.share.ranks
        self.metrics_processor.ntokens_since_last_log += turn.tokens
        return pack, labels, {"weights": self._weights.of(turn.step)}

    def _take(self, step: int, index: int) -> PackTensors:
        """Return a pack, or this rank's share of it. If one rank of a group must train it as zero, all of them do."""
        prefetcher = self._around.prefetcher
        pack, group = prefetcher.take(step, index), self._group()
        if group is None:
            return pack
        lacking = torch.tensor(not pack.lengths, dtype=torch.int32, device=self.device)
        dist.all_reduce(lacking, dist.ReduceOp.MAX, group)
        if not lacking or not pack.lengths:
            return pack
        prefetcher.give_up(step, index, "another rank of its group lacks it")
        return prefetcher.take(step, index)

    def _group(self) -> dist.ProcessGroup | None:
        """Return the ranks that train a pack together; None if each rank trains its own."""
        return self.parallel_dims.get_mesh("cp").get_group() if self._around.share.ranks > 1 else None

    def forward_backward_step(self, *, input_dict: Any, labels: Any, global_valid_tokens: Tensor) -> Tensor:
        """Train one pack. After the last one, sum the results of all ranks, before the optimizer uses the gradients."""
        turn: MicroBatch = input_dict["input"]
        loss = super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
        )
        if self._around.observer is not None and self._pack is not None:
            facts, void = self._around.steps.facts(turn.step), self._around.prefetcher.void(turn.step)
            self._around.observer.pack(facts.packs[turn.index], self._pack, self.loss_fn.packs[-1], void)
        self._pack = None
        self._around.prefetcher.release(turn.step, turn.index)
        if turn.last:
            self._sums = self._add_up()
            self._skipped = self._broken(self._sums)
            if self._skipped:
                if not self._around.skip_not_finite:
                    raise NotFiniteError(self._skipped)
                log.warning("step skipped why=%s", self._skipped)
                # AdamW leaves parameters without gradients as they are.
                self.optimizers.zero_grad(set_to_none=True)
        # torchtitan only checks whether this is finite.
        return torch.nan_to_num(loss.detach(), posinf=0.0, neginf=0.0) if self._around.skip_not_finite else loss

    def _broken(self, sums: StepSums) -> str:
        """Describe what is not finite in this step; empty if everything is finite. All ranks return the same.

        Gradients are checked only if steps are to be skipped: otherwise their norm shows it later.
        """
        facts, packs = self._around.steps.facts(self.step), self.loss_fn.packs
        if not torch.isfinite(sums.weighted).all():
            broken = [
                f"{pack.epoch}.{pack.index} with the samples {', '.join(map(str, pack.samples))}"
                for pack, result in zip(facts.packs, packs, strict=True)
                if not torch.isfinite(result[0]).all()
            ]
            every = "; ".join(dict.fromkeys(self._of_all_ranks(broken)))
            return f"the loss of step {self.step} is not finite; broken packs: {every}"
        if self._around.skip_not_finite and not self._gradients_are_finite():
            return f"a gradient of step {self.step} is not finite; {self._samples(facts)}"
        return ""

    def _gradients_are_finite(self) -> bool:
        broken = torch.zeros(1, device=self.device)
        for model in self.model_parts:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                    broken += ~torch.isfinite(gradient).all()
        dist.all_reduce(broken)
        return not broken.item()

    def _samples(self, facts: StepFacts) -> str:
        samples = sorted({*self._of_all_ranks([sample for pack in facts.packs for sample in pack.samples])})
        return f"its packs have the samples {', '.join(map(str, samples))}"

    def _report_last(self) -> None:
        """Report the last step once its snapshot is on disk: engines exit then, so it could not be trained again."""
        if self._last_to_report:
            self._around.prefetcher.finish(self.step)
            self._last_to_report = False

    def _join(self) -> None:
        around = self._around
        if around.superseded is not None:
            self.checkpointer.superseded = around.superseded
        best = None
        if self._rank == 0 and around.metrics is not None:
            self._metrics = MetricsFile(around.metrics, self.step)
            if around.trackers is not None:
                self.metrics_processor.logger = around.trackers
                around.trackers.start()
            self.checkpointer.best = partial(best_step, around.metrics)
            best = best_evaluation(around.metrics, self.step)
        self.checkpointer.pace = around.pace
        # Only one rank's answer counts: on a shared file system, ranks may see different files.
        self._best = self._of_all_ranks([best])[0]
        if around.observer is not None:
            around.observer.start(self.step)
        around.client.join(self._rank, self._ranks, around.segment, around.segment_bytes, self.step, around.generation)
        around.prefetcher.start(self.step)
        self._joined = True
        self._step_ended = time.perf_counter()
        log.info("joined rank=%d ranks=%d step=%d segment=%s", self._rank, self._ranks, self.step, around.segment)

    def _evaluate(self) -> dict[str, Any] | None:
        """Evaluate the draft, if an evaluation is due after this step."""
        heldout, last = self._around.heldout, self.config.training.steps
        if heldout is None or (self.step % self._around.evaluate_steps and self.step != last):
            return None
        (model,) = self.model_parts
        evaluation = heldout.evaluate(model)
        # FSDP does this in a backward pass, and there is none.
        model.reshard()
        return evaluation

    def _is_best(self, evaluation: dict[str, Any] | None) -> bool:
        """Return whether this evaluation is the best so far. All ranks return the same."""
        if evaluation is None or (self._best is not None and merit(evaluation) < merit(self._best)):
            return False
        self._best = evaluation
        return True

    def _calibrate(self) -> None:
        """Calibrate the new draft to the states of the first step's packs, with the same result on all ranks."""
        (model,) = self.model_parts
        packs = [self._take(1, index) for index in range(self._around.steps.packs_per_rank)]
        mean_square = {}
        for name in model.calibrated:
            sums = torch.zeros(packs[0].rows[name].shape[1] + 1, dtype=torch.float64, device=self.device)
            for pack in packs:
                sums[:-1] += pack.rows[name].double().square().sum(0)
                sums[-1] += len(pack.rows[name])
            dist.all_reduce(sums)
            if sums[-1]:
                mean_square[name] = sums[:-1] / sums[-1]
        if mean_square:
            model.calibrate(mean_square)

    def _add_up(self) -> StepSums:
        prefetcher, packs = self._around.prefetcher, self.loss_fn.packs
        waited_s = self._waited_s + prefetcher.take_waited_s()
        self._waited_s = 0.0
        void = 0 if self._around.share.rank else len(prefetcher.void(self.step))
        pace = self._around.pace
        due = pace is not None and pace.due(time.monotonic())
        return gather(packs, waited_s, void, snapshot_due=due)

    def _of_all_ranks(self, mine: list[Any]) -> list[Any]:
        of_ranks: list[Any] = [None] * self._ranks
        dist.all_gather_object(of_ranks, mine)
        return [item for part in of_ranks for item in part]

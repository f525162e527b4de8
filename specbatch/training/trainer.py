"""torchtitan's trainer, with what is different here: packs come when their turn comes, the dispatcher says
whether a step may begin, and every step is reported.
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
from specbatch.errors import RunError
from specbatch.evaluations import best_evaluation, best_step, merit
from specbatch.snapshot.pace import Pace
from specbatch.training.dataloader import Turn
from specbatch.training.drafts.pack import PackTensors, Share
from specbatch.training.heldout import HeldOut
from specbatch.training.metrics import StepSums, UnrolledLoss, gather, metrics_line
from specbatch.training.metrics_file import MetricsFile
from specbatch.training.sources import Conductor, Observer, PackSource
from specbatch.training.steps import StepFacts, Steps

log = logging.getLogger(__name__)


class NotFiniteError(RunError):
    """A step gave a loss or a gradient that is no number. It would again."""


@dataclass(frozen=True)
class Surroundings:
    """What a rank is connected to."""

    client: Conductor
    prefetcher: PackSource
    steps: Steps
    segment: str
    """Name of the memory that this rank lends the store."""
    segment_bytes: int
    generation: int
    """How often the ranks were started."""
    metrics: Path | None
    """Where steps are reported; None: nowhere."""
    step_decay: float
    calibrate: bool
    """Whether the draft is new, and has to be fitted to the target's states."""
    skip_not_finite: bool
    """Whether a step whose loss or gradient is no number changes nothing, in place of ending the run."""
    heldout: HeldOut | None
    """For evaluations during training."""
    evaluate_steps: int
    """Steps between two of them; the last step is evaluated in any case."""
    share: Share
    """Which part of its packs this rank trains."""
    pace: Pace | None
    """When snapshots are due; None: every so many steps."""
    observer: Observer | None
    """Is shown each pack and each step, as they were trained."""
    superseded: Callable[[], bool] | None = None
    """Whether a later attempt has begun; None: there are no attempts."""


class DraftTrainer(Trainer):
    """One rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    loss_fn: UnrolledLoss

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
        """Why the present step changes nothing."""
        self._best: dict[str, Any] | None = None
        self._pack: PackTensors | None = None
        self.stopped: str | None = None
        """Why training ended before its last step."""

    def should_continue_training(self) -> bool:
        """Ask to begin the next step. Where the answer is to stop, save what is trained and leave."""
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
                    # What comes before is the start of engines, not this step.
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
        """Train a step, report it, and give its packs back to the store."""
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
            facts, sums, step_decay=self._around.step_decay, grad_norm=grad_norm,
            learning_rate=self.metrics_processor.learning_rate, seconds=seconds,
            snapshot_s=self.checkpointer.take_blocked_s(), evaluation=evaluation, skipped=self._skipped,
        )  # fmt: skip
        if self._metrics is not None:
            self._metrics.write(line)
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
        """Put the pack itself in the place of its turn."""
        turn: Turn = input_dict["input"]
        self._pack = pack = self._take(turn.step, turn.index)
        weights = torch.from_numpy(self._around.steps.facts(turn.step).weights).to(self.device)
        self.ntokens_seen += labels.numel() // self._around.share.ranks
        return pack, labels, {"weights": weights}

    def _take(self, step: int, index: int) -> PackTensors:
        """A pack, or this rank's share of it. Ranks that train it together train it as zero if one of them must."""
        prefetcher = self._around.prefetcher
        pack, group = prefetcher.take(step, index), self._group()
        if group is None:
            return pack
        lacking = torch.tensor(not pack.lengths, dtype=torch.int32, device=self.device)
        dist.all_reduce(lacking, dist.ReduceOp.MAX, group)
        if not lacking or not pack.lengths:
            return pack
        prefetcher.give_up(step, index, "a rank that trains it too has not got it")
        return prefetcher.take(step, index)

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks that train a pack together; None where each trains its own."""
        return self.parallel_dims.get_mesh("cp").get_group() if self._around.share.ranks > 1 else None

    def forward_backward_step(self, *, input_dict: Any, labels: Any, global_valid_tokens: Tensor) -> Tensor:
        """One pack; after the last one, what all ranks' packs gave, before the optimizer uses it."""
        turn: Turn = input_dict["input"]
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
        # torchtitan only looks whether this is finite.
        return torch.nan_to_num(loss.detach(), posinf=0.0, neginf=0.0) if self._around.skip_not_finite else loss

    def _broken(self, sums: StepSums) -> str:
        """What of this step is no number, the same on all ranks; empty if all is well.

        A gradient is looked at only where the step would be skipped: else its norm tells, a little later.
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
        """Report the last step, now that its snapshot is on disk: engines leave then, and no step could be repeated."""
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
            self.checkpointer.best = partial(best_step, around.metrics)
            best = best_evaluation(around.metrics, self.step)
        self.checkpointer.pace = around.pace
        # Asked of one rank: on a shared file system others may see another file.
        self._best = self._of_all_ranks([best])[0]
        if around.observer is not None:
            around.observer.start(self.step)
        around.client.join(self._rank, self._ranks, around.segment, around.segment_bytes, self.step, around.generation)
        around.prefetcher.start(self.step)
        self._joined = True
        self._step_ended = time.perf_counter()
        log.info("joined rank=%d ranks=%d step=%d segment=%s", self._rank, self._ranks, self.step, around.segment)

    def _evaluate(self) -> dict[str, Any] | None:
        """What the draft is worth after this step, if it is its turn."""
        heldout, last = self._around.heldout, self.config.training.steps
        if heldout is None or (self.step % self._around.evaluate_steps and self.step != last):
            return None
        (model,) = self.model_parts
        evaluation = heldout.evaluate(model)
        # There is no backward pass that would.
        model.reshard()
        return evaluation

    def _is_best(self, evaluation: dict[str, Any] | None) -> bool:
        """Whether the draft was never better than now; all ranks know the same evaluations."""
        if evaluation is None or (self._best is not None and merit(evaluation) < merit(self._best)):
            return False
        self._best = evaluation
        return True

    def _calibrate(self) -> None:
        """Fit the new draft to the states of the first step's packs, the same on all ranks."""
        (model,) = self.model_parts
        packs = [self._take(1, index) for index in range(self._around.steps.packs_per_rank)]
        sums = torch.zeros(packs[0].aux.shape[1] + 1, dtype=torch.float64, device=self.device)
        for pack in packs:
            sums[:-1] += pack.aux.double().square().sum(0)
            sums[-1] += pack.aux.shape[0]
        dist.all_reduce(sums)
        if sums[-1]:
            model.calibrate(sums[:-1] / sums[-1])

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

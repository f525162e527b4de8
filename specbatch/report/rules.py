"""Rules that find what is not normal about a run, and say it in sentences. Pure, except for reading one file of counts.

A rule checks one thing. It returns a finding, or None if all is well, or raises `NotKnown` if the run lacks the data
for it. Thresholds are wide: a finding deserves a look, and a run without one is most likely worth its nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specbatch.report.reading import RunRecord
from specbatch.report.references import Reference, curve
from specbatch.report.thin import buckets


class NotKnown(Exception):
    """The run lacks the data for a rule; the message says what is missing."""


@dataclass(frozen=True)
class Concern:
    """Something that is off."""

    rule: str
    what: str
    """Observation, with its numbers."""
    do: str
    """Possible cause, and what to do."""
    serious: bool = True
    """Whether continuing like this is probably a waste."""


Rule = Callable[[RunRecord, Sequence[Reference]], Concern | None]

LOW_ACCURACY = 0.7
"""Share of the lowest reference at equal tokens below which an accuracy is off."""
EARLY_TOKENS, EARLY_STEPS, EARLY_WARMUPS = 30_000, 150, 3
"""Tokens, steps, and multiples of the warm-up before which no accuracy is judged."""
RISE = 1.15
"""Ratio of the smoothed loss to its minimum above which the loss is rising."""
GROWTH = 5.0
"""Ratio of the median gradient norm of the last quarter to that of an earlier quarter above which gradients grow."""
SKIPPED_SHARE = 0.005
STARVED_SHARE = 0.2
COVERED_SHARE = 0.95
"""Share of the loss tokens that a draft's vocabulary should cover at least."""
ENOUGH_COVERED = 0.99
MOST_LOSS_TOKENS, LEAST_LOSS_TOKENS = 0.9, 0.03
FEW_ACCEPTED = 0.6
"""Share of the accuracy below which acceptance is suspicious (`specbatch.evaluation.statistics.TOO_LOW`)."""
FAR = 0.1
"""Difference of two accuracies that is reported."""
STANDARD_ERRORS = 3.0
PAST_BEST = 0.02


def judge(run: RunRecord, references: Sequence[Reference]) -> tuple[list[Concern], list[str]]:
    """Apply all rules.

    Returns:
        findings, the serious ones first; and for each rule that could not be judged, its name and why.
    """
    found: list[Concern] = []
    unknown: list[str] = []
    for name, rule in RULES.items():
        try:
            finding = rule(run, references)
        except NotKnown as why:
            unknown.append(f"{name}: {why}")
        else:
            found += [finding] if finding else []
    return sorted(found, key=lambda finding: not finding.serious), unknown


def low_accuracy(run: RunRecord, references: Sequence[Reference]) -> Concern | None:
    """The draft learns much less than others did from as many tokens: a wrong chat template is the usual cause."""
    tokens_N, accuracy_N = curve(run)
    steps = max(EARLY_STEPS, EARLY_WARMUPS * int(run.setting("training.warmup_steps", 50)))
    if not len(tokens_N) or tokens_N[-1] < EARLY_TOKENS or run.metrics.step_S[-1] < steps:
        raise NotKnown(f"fewer than {EARLY_TOKENS:,} tokens or {steps} steps are trained")
    tokens, accuracy = float(tokens_N[-1]), float(accuracy_N[-3:].mean())
    near = [each for each in references if each.own] or list(references)
    reached = sorted(value for each in near if (value := each.at(tokens)) is not None)
    if not reached:
        raise NotKnown("no reference has as few tokens")
    if accuracy >= LOW_ACCURACY * reached[0]:
        return None
    whose = "your runs with this target" if near[0].own else "the project's reference runs"
    span = f"{reached[0]:.2f}" if reached[-1] - reached[0] < 0.01 else f"{reached[0]:.2f} to {reached[-1]:.2f}"
    return Concern(
        "accuracy",
        f"Accuracy of {run.metrics.terms[0]} is {accuracy:.2f} after {int(run.metrics.step_S[-1]):,} steps and "
        f"{_count(tokens)} tokens; {whose} had {span} with as many or fewer.",
        "Is the chat template the target's own? `specbatch data --config` shows what a conversation becomes. Are the "
        "answers the target's own? `specbatch regenerate` lets it write them.",
    )


def loss_on_wrong_tokens(run: RunRecord, references: Sequence[Reference]) -> Concern | None:
    """Nearly all tokens, or hardly any, enter the loss: it is on other turns than the answers."""
    tokens, learnt = int(run.metrics.tokens_S.sum()), int(run.metrics.loss_tokens_S.sum())
    if not tokens:
        raise NotKnown("no step is trained")
    share, setting = learnt / tokens, run.setting("data.loss_on", "assistant")
    if share > MOST_LOSS_TOKENS:
        change = (
            "Does the chat template mark the answers? " if setting == "assistant" else "Set data.loss_on: assistant. "
        )
        return Concern(
            "loss tokens",
            f"{share:.0%} of all tokens enter the loss (data.loss_on: {setting}): the draft learns to propose "
            "questions and markers, too, which the target never has to write.",
            f"{change}See with `specbatch data --config` which tokens are coloured.",
        )
    if share < LEAST_LOSS_TOKENS:
        return Concern(
            "loss tokens",
            f"Only {share:.1%} of all tokens enter the loss (data.loss_on: {setting}): nearly all that the engines "
            "compute is history.",
            "See with `specbatch data --config` which tokens are coloured; data.loss_on: assistant learns from all "
            "answers of a conversation.",
        )
    return None


def other_answers(run: RunRecord, references: Sequence[Reference]) -> Concern | None:
    """Acceptance in real decoding is above the held-out accuracy: the answers are not the target's own."""
    held_out, (rate, noise) = _held_out_accuracy(run), _first_rate(run)
    if rate - held_out <= max(FAR, noise):
        return None
    return Concern(
        "answers",
        f"The target accepts {rate:.0%} of first drafts on its own answers, but only {held_out:.0%} are right on the "
        "held-out conversations: their answers were written by another model, or by people.",
        "`specbatch regenerate` lets the target write them; drafts learn more from what the target would say.",
    )


def not_as_trained(run: RunRecord, references: Sequence[Reference]) -> Concern | None:
    """Real decoding accepts far less than training promises: the draft is served otherwise than it was trained."""
    rate, noise = _first_rate(run)
    if run.metrics.evaluations:
        promised, whose = _held_out_accuracy(run), "held-out conversations"
    else:
        _, accuracy_N = curve(run)
        if not len(accuracy_N):
            raise NotKnown("no step is trained")
        promised, whose = float(accuracy_N[-1]), "the training data"
    if rate >= FEW_ACCEPTED * promised or promised - rate <= noise:
        return None
    return Concern(
        "decoding",
        f"The target accepts {rate:.0%} of first drafts in real decoding, but {promised:.0%} are right on {whose}.",
        "Is the chat template of the training data the one that is served? Is the loss on the answers, and are they "
        "the target's own (`specbatch regenerate`)? `specbatch evaluate` names further causes among its warnings.",
    )


def rising_loss(run: RunRecord, references: Sequence[Reference]) -> Concern | None:
    """The loss rises, gradients grow or steps are skipped: the learning rate is too high."""
    metrics = run.metrics
    if len(metrics) < 40:
        raise NotKnown("fewer than 40 steps are trained")
    rate = run.setting("training.learning_rate", "not told")
    lower = f"Lower training.learning_rate, which is {rate}, by a factor of 3, or warm up for longer."
    if len(metrics.skipped) > max(1.0, SKIPPED_SHARE * len(metrics)):
        return Concern(
            "learning rate",
            f"{len(metrics.skipped)} of {len(metrics):,} steps were skipped: their loss or gradient was not finite.",
            lower,
        )
    smooth = buckets(len(metrics), 40).mean(metrics.scalars["loss"])
    smooth = smooth[np.isfinite(smooth)]
    if len(smooth) >= 4 and smooth[-3:].min() > RISE * smooth.min() > 0:
        at = int(np.argmin(smooth) + 1) / len(smooth)
        return Concern(
            "learning rate",
            f"The training loss rises: it was {smooth.min():.2f} after {at:.0%} of the steps and is {smooth[-1]:.2f}.",
            lower,
        )
    # How large gradients are depends on the number of terms; that they grow does not.
    norms = [part[np.isfinite(part)] for part in np.array_split(metrics.scalars["grad_norm"], 4)]
    middles = [float(np.median(part)) if len(part) else math.nan for part in norms]
    limit, least = float(run.setting("training.max_grad_norm", 0.5)), min(middles[1:])
    if middles[-1] > max(limit, GROWTH * least):
        return Concern(
            "learning rate",
            f"Gradients grow: their norm was {least:.2g} and is {middles[-1]:.2g}; steps scale them down to {limit:g}.",
            lower,
        )
    return None


def small_vocabulary(run: RunRecord, references: Sequence[Reference]) -> Concern | None:
    """The draft's vocabulary lacks many of the tokens that the target writes."""
    size = run.setting("draft.vocab_size", 32000)
    if size is None:
        return None
    counts = np.sort(_token_counts(run))[::-1].astype(np.float64)
    total = counts.sum()
    if total == 0:
        raise NotKnown("the corpus has no loss tokens")
    covered_V = np.cumsum(counts) / total
    covered = float(covered_V[min(int(size), len(counts)) - 1])
    if covered >= COVERED_SHARE:
        return None
    enough = min(len(counts), -(-(int(np.argmax(covered_V >= ENOUGH_COVERED)) + 1) // 1024) * 1024)
    return Concern(
        "vocabulary",
        f"draft.vocab_size {int(size):,} covers {covered:.1%} of the loss tokens: the draft can't propose the others.",
        f"{enough:,} would cover {ENOUGH_COVERED:.0%}.",
    )


def starved(run: RunRecord, references: Sequence[Reference]) -> Concern | None:
    """Trainers wait for packs."""
    metrics = run.metrics
    half = slice(len(metrics) // 2, None)
    seconds = float(np.nansum(metrics.scalars["seconds"][half]))
    if len(metrics) < 20 or seconds <= 0:
        raise NotKnown("fewer than 20 steps are trained")
    share = float(np.nansum(metrics.scalars["wait_s"][half])) / seconds
    if share <= STARVED_SHARE:
        return None
    engines = int(run.setting("inference.engines", 1))
    enough = math.ceil(engines / max(0.05, 1 - share))
    return Concern(
        "balance",
        f"Trainers waited for packs {share:.0%} of the time: {engines} "
        f"{'engine is' if engines == 1 else 'engines are'} too few.",
        f"About {enough} engines would keep them busy: `specbatch scale {run.path} --engines "
        f"+{max(1, enough - engines)}`.",
        serious=share > 0.5,
    )


def worse_than_start(run: RunRecord, references: Sequence[Reference]) -> Concern | None:
    """The draft is worse on held-out conversations than at its first evaluation, or than it has been."""
    found = list(run.metrics.evaluations.items())
    if len(found) < 2:
        raise NotKnown("fewer than two evaluations on held-out data (training.evaluate_interval_steps)")
    (first_step, first), (last_step, last) = found[0], found[-1]
    best_step, best = max(found, key=lambda item: _merit(item[1]))
    if _merit(last) < _merit(first) and last["loss"] > first["loss"]:
        start = run.setting("draft.init_from")
        whose = f"than near its start, from {start}" if start else "than at its first evaluation"
        return Concern(
            "held-out",
            f"The draft is worse now {whose}: {_words(first)} after step {first_step:,}, {_words(last)} after step "
            f"{last_step:,}.",
            "Is the training data of the same kind as the held-out data? Lower training.learning_rate. The best draft: "
            f"`specbatch export {run.path} --best`.",
        )
    if _merit(last) < _merit(best) and last["loss"] > (1 + PAST_BEST) * best["loss"]:
        return Concern(
            "held-out",
            f"The draft is past its best: {_words(best)} after step {best_step:,}, {_words(last)} after step "
            f"{last_step:,}.",
            f"It overfits; more conversations help. `specbatch export {run.path} --best`.",
            serious=False,
        )
    return None


def lost_work(run: RunRecord, references: Sequence[Reference]) -> Concern | None:
    """Packs trained as zero."""
    if not len(run.metrics):
        raise NotKnown("no step is trained")
    void = int(run.metrics.void_S.sum())
    if not void:
        return None
    return Concern(
        "packs",
        f"{void} packs could not be computed and trained as zero.",
        f"`specbatch status {run.path}` names them and why.",
        serious=False,
    )


RULES: dict[str, Rule] = {
    "accuracy beside other runs": low_accuracy,
    "share of loss tokens": loss_on_wrong_tokens,
    "answers of the target": other_answers,
    "real decoding beside training": not_as_trained,
    "learning rate": rising_loss,
    "vocabulary of the draft": small_vocabulary,
    "balance of engines and trainers": starved,
    "held-out data": worse_than_start,
    "lost packs": lost_work,
}
"""All rules, by what they check."""


def _held_out_accuracy(run: RunRecord) -> float:
    if not run.metrics.evaluations:
        raise NotKnown("no evaluation on held-out data (training.evaluate_interval_steps)")
    accuracy = next(reversed(run.metrics.evaluations.values()))["accuracy"]
    if not accuracy or accuracy[0] is None:
        raise NotKnown("the held-out data has nothing to propose")
    return float(accuracy[0])


def _first_rate(run: RunRecord) -> tuple[float, float]:
    """Share of the first drafts that were accepted, and how far chance may have moved it."""
    rate = (run.evaluation or {}).get("acceptance_rate")
    if not rate:
        raise NotKnown("the draft is not measured yet (evaluation.json)")
    steps = (run.evaluation or {}).get("verify_steps") or 1
    return float(rate[0]), STANDARD_ERRORS * math.sqrt(0.25 / steps)


def _token_counts(run: RunRecord) -> np.ndarray:
    """Number of times that each token is a loss token, ``[V]``."""
    path = (run.corpus.get("train") or {}).get("path")
    if not path or not (counts := Path(path) / "loss_token_counts.npy").is_file():
        raise NotKnown("the prepared data no longer exists")
    return np.asarray(np.load(counts))


def _merit(evaluation: dict[str, Any]) -> tuple[float, float]:
    return evaluation.get("acceptance_length") or 0.0, -evaluation["loss"]


def _words(evaluation: dict[str, Any]) -> str:
    length = evaluation.get("acceptance_length")
    return f"loss {evaluation['loss']:.2f}" + (f" and acceptance length {length:.2f}" if length else "")


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"

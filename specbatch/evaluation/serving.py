"""Measures how much faster a draft makes its target: speculative and plain decoding of the same prompts.

SGLang does both greedily, with the same arguments in the same run, and their outputs are compared token for
token. On a machine without accelerator SGLang drafts through `specbatch.inference.cpu_speculative`; there the
acceptance length is what counts, since drafting costs nearly as much time as it saves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from specbatch.config import Config, Evaluate
from specbatch.errors import RunError, UserError
from specbatch.evaluation.differences import (
    MOST,
    difference_text,
    difference_warnings,
    partings,
    verdict,
)
from specbatch.evaluation.engines import (
    Questions,
    Subject,
    ask,
    ask_in_steps,
    logits_at,
    memory_for_two,
    running,
    server_of,
    warm_up,
)
from specbatch.evaluation.statistics import DecodedAnswers, disagreements, measure
from specbatch.evaluation.stored_states import measured_from_stored_states, runs_on_cpu
from specbatch.evaluation.subjects import (
    check_runs_on_cpu,
    chosen_prompts,
    prompts_of_draft,
    prompts_of_run,
    subject_of_draft,
    subject_of_run,
)
from specbatch.evaluation.sweep import Point, measure_points, sweep_document, sweep_lines
from specbatch.evaluation.transcripts import VerifyStep, answer
from specbatch.export.card import tell_measured
from specbatch.gpus import count_accelerators
from specbatch.inference.nodes import FurtherNodes
from specbatch.inference.server import accelerator_available
from specbatch.metrics_lines import read_metrics
from specbatch.rundir import RunDir, write_json

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the amount done, and the total."""

CPU_NOTE = (
    "on a CPU only the acceptance length counts: drafting and verifying cost time there that they do not cost on a GPU"
)
METRICS_STEPS = 20
"""Number of last training steps whose accuracies are averaged, since one step is noisy."""


def evaluate(
    run_dir: RunDir,
    *,
    draft: Path | None = None,
    settings: Evaluate | None = None,
    progress: Progress | None = None,
    nodes: FurtherNodes | None = None,
) -> dict[str, Any]:
    """Measure a run's draft and write ``evaluation.json``.

    Args:
        run_dir: the run whose target, held-out prompts and metrics are used.
        draft: directory of the draft; the run's export if not given.
        settings: the run's ``evaluate`` section if not given.
        progress: called at each stage.
        nodes: the engine's further nodes, for a target that is larger than a node.

    Returns:
        The content of the file. `summary_line` and `report` put it into words.

    Raises:
        UserError: there is no draft for this target, or nothing to measure it with.
        RunError: an engine failed.
    """
    subject = subject_of_run(run_dir, draft, settings, nodes)
    if not accelerator_available() and not runs_on_cpu(subject.algorithm, subject.settings.draft_tokens):
        # The draft's card has this result already.
        evaluation = measured_from_stored_states(run_dir, subject.algorithm, subject.draft)
        write_json(run_dir.evaluation, evaluation)
        return evaluation
    if nodes is None and accelerator_available():
        _check_gpus(subject.config)
    prompts = prompts_of_run(run_dir, subject)
    evaluation = measure_draft(subject, prompts, accuracy=training_accuracy(run_dir.metrics), progress=progress)
    write_json(run_dir.evaluation, evaluation)
    tell_measured(subject.draft, evaluation)
    return evaluation


def evaluate_draft(draft: Path, config: Config, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measure any draft for a target, whoever trained it, and write ``evaluation.json`` into ``run.dir``.

    Args:
        config: as for `subject_of_draft`.

    Returns:
        The content of the file.

    Raises:
        UserError: the draft does not fit the target, or there is nothing to measure it with.
        RunError: an engine failed.
    """
    subject = subject_of_draft(draft, config)
    if accelerator_available():
        _check_gpus(subject.config)
    else:
        check_runs_on_cpu(subject, "use a machine with a GPU")
    evaluation = measure_draft(subject, prompts_of_draft(subject), progress=progress)
    write_json(RunDir(Path(config.run.dir)).evaluation, evaluation)
    return evaluation


def measure_draft(
    subject: Subject, prompts: Questions, *, accuracy: list[float] | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure a draft on prompts; the first set is the main one.

    Args:
        accuracy: of each position at the end of training.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        UserError: prompts and settings do not fit together.
        RunError: an engine failed.
    """
    started = time.monotonic()
    settings, shape = subject.settings, subject.shape
    questions, warnings = chosen_prompts(subject, prompts)
    found = _decode(subject, questions, progress or (lambda stage, done, total: None))
    main = next(iter(questions))

    dtype = shape.dtype if subject.dtype == "auto" else subject.dtype
    plain, speculative = found.answers[0], found.answers[settings.draft_tokens]
    evaluation = measure(plain, speculative, settings.draft_tokens)
    apart = [verdict(parting, logits, dtype) for parting, logits in zip(found.partings, found.logits, strict=True)]
    differing = evaluation["prompts"] - evaluation["identical"]
    warnings += [
        *difference_warnings(apart, evaluation["prompts"], dtype, differing),
        *disagreements(evaluation["acceptance_rate"], accuracy or [], evaluation["verify_steps"]),
    ]
    evaluation |= {
        "set": main,
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "dtype": dtype,
        "device": found.device,
        "seconds": time.monotonic() - started,
        "training_accuracy": accuracy,
        "draft": str(subject.draft),
        "target": str(shape.path),
        "sglang": version("sglang"),
        "note": CPU_NOTE if found.device == "cpu" else None,
        "warnings": warnings,
        "differences": apart,
        "answers": _answers(subject.config, found.seen),
        **({"sweep": sweep_document(subject, found.points)} if subject.sweeps else {}),
    }
    for warning in warnings:
        logger.warning("evaluation: %s", warning)
    logger.info("evaluated acceptance_length=%.3f seconds=%.1f", evaluation["acceptance_length"], evaluation["seconds"])
    return evaluation


@dataclass
class _Decoded:
    """What the engines returned."""

    answers: dict[int, DecodedAnswers] = field(default_factory=dict)
    """To the main prompts, by the number of draft tokens."""
    points: list[Point] = field(default_factory=list)
    seen: list[tuple[list[int], list[VerifyStep]]] = field(default_factory=list)
    """A few prompts with the verify steps of their answers."""
    partings: list[Any] = field(default_factory=list)
    logits: list[tuple[float, float] | None] = field(default_factory=list)
    device: str = ""


def _decode(subject: Subject, questions: Questions, tell: Progress) -> _Decoded:
    """Decode all prompts plainly, and with each number of draft tokens.

    Raises:
        RunError: an engine failed, or drafted nothing.
    """
    found, main = _Decoded(), next(iter(questions.values()))
    chosen = subject.settings.draft_tokens
    others = [count for count in subject.draft_tokens if count != chosen] if subject.sweeps else []
    # Where engines run one at a time, plain decoding comes last: its engine then computes the logits at differences.
    together = not accelerator_available() and memory_for_two(subject.shape)
    groups = [[0, chosen], *([count] for count in others)] if together else [[chosen], *([c] for c in others), [0]]
    count = 2 + len(others)
    for group in groups:
        tell("starting engines", len(found.answers), count)
        servers = {drafts: server_of(subject, drafts, questions) for drafts in group}
        with running([*servers.values()]):
            for drafts, server in servers.items():
                stage = "speculative decoding" if drafts else "plain decoding"
                tell(stage, 0, len(main))
                warm_up(server, subject, main[0])
                if drafts in (0, chosen):
                    found.answers[drafts] = answers = ask(server, subject, main, drafts)
                    if drafts and not sum(answers.histogram):
                        raise RunError(
                            f"SGLang decoded {answers.count} tokens without a single verify step; its log: {server.log}"
                        )
                if drafts == chosen:
                    found.device = server.get("/server_info")["device"]
                    found.seen = ask_in_steps(server, subject, main)
                if subject.sweeps and (drafts == 0 or drafts in subject.draft_tokens):
                    found.points += measure_points(server, subject, questions, drafts)
                tell(stage, len(main), len(main))
            if 0 in servers:
                found.partings = partings(found.answers[0], found.answers[chosen])[:MOST]
                found.logits = logits_at(servers[0], found.partings, main, found.answers[0])
    return found


def _answers(config: Config, seen: list[tuple[list[int], list[VerifyStep]]]) -> list[dict[str, Any]]:
    """The kept answers with their verify steps, as text."""
    from specbatch.corpus.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config)
    return [answer(tokenizer, prompt, steps) for prompt, steps in seen]


def report(evaluation: dict[str, Any]) -> list[str]:
    """The rest of the result as text, one line for each finding."""
    lines = [f"drafts accepted by position: {_percent(evaluation['acceptance_rate'])}"]
    if sure := evaluation.get("acceptance_length_interval"):
        lines.append(f"acceptance length: {sure[0]:.2f} to {sure[1]:.2f} (95 %, bootstrap over prompts)")
    if evaluation["training_accuracy"]:
        lines.append(
            f"accuracy at the end of training, each position by itself: {_percent(evaluation['training_accuracy'])}"
        )
    if "tokens_per_s_plain" in evaluation:
        lines.append(
            f"tokens/s: {evaluation['tokens_per_s_plain']:.1f} plain, {evaluation['tokens_per_s_speculative']:.1f} "
            f"speculative ({evaluation['device']}, {evaluation['dtype']}, {evaluation['batch_size']} at once)"
        )
    lines += [f"differs from plain decoding: {difference_text(each)}" for each in evaluation.get("differences", [])[:5]]
    if "sweep" in evaluation:
        lines += sweep_lines(evaluation["sweep"])
    if evaluation["note"]:
        lines.append(f"note: {evaluation['note']}")
    return [*lines, *(f"warning: {warning}" for warning in evaluation["warnings"])]


def training_accuracy(metrics: Path) -> list[float] | None:
    """Accuracy of each position, averaged over the last `METRICS_STEPS` steps; None if nothing is recorded."""
    rows = [line.accuracy for line in read_metrics(metrics)[-METRICS_STEPS:]]
    positions = max(map(len, rows), default=0)
    means = []
    for position in range(positions):
        values = [row[position] for row in rows if position < len(row)]
        known = [value for value in values if value is not None]
        if not known:
            break
        means.append(sum(known) / len(known))
    return means or None


def _percent(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.0%}" for share in shares)


def _check_gpus(config: Config) -> None:
    """Check that this machine has the GPUs that the target needs."""
    there, need = count_accelerators()[0], config.inference.tensor_parallel
    if there < need:
        raise UserError(
            f"inference.tensor_parallel: {need} GPUs serve the target, and this machine has {there}: a run whose "
            "engines are larger than a node measures its draft itself, at its end"
        )

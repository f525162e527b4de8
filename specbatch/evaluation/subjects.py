"""What a measurement needs before its engines start: draft, target and prompts, checked against each other."""

from __future__ import annotations

from pathlib import Path

from specbatch.config import Config, Evaluate, load_config
from specbatch.corpus import open_corpus
from specbatch.drafts.base import algorithm_of
from specbatch.errors import UserError
from specbatch.evaluation.engines import Questions, Subject
from specbatch.evaluation.prompts import benchmark_prompts, conversation_prompts, spread
from specbatch.evaluation.published import check_draft, config_of
from specbatch.evaluation.stored_states import runs_on_cpu
from specbatch.evaluation.sweep import check_counts, check_sweep
from specbatch.inference.nodes import FurtherNodes
from specbatch.rundir import RunDir
from specbatch.target import read_target

HELDOUT = "heldout"
"""Name of the set of prompts that come from ``data.heldout``."""


def subject_of_run(
    run_dir: RunDir, draft: Path | None = None, settings: Evaluate | None = None, nodes: FurtherNodes | None = None
) -> Subject:
    """The measurement of a run's draft; arguments as for `specbatch.evaluation.serving.evaluate`.

    Raises:
        UserError: there is no draft for this target.
    """
    config = load_config(run_dir.config)
    config.evaluate = settings or config.evaluate
    shape = read_target(config.target.path)
    folder = draft or run_dir.export
    if draft is None and not (folder / "config.json").is_file():
        raise UserError(f"{run_dir.root} has no exported draft yet: make it with `specbatch export {run_dir.root}`")
    check_draft(folder, shape)
    logs = run_dir.component_log(max(run_dir.attempts(), default=0), "evaluate", 0).parent
    return Subject(config, config.evaluate, shape, algorithm_of(config, shape), folder, logs, nodes)


def prompts_of_run(run_dir: RunDir, subject: Subject) -> Questions:
    """The run's held-out prompts, and those of ``evaluate.sets``.

    Raises:
        UserError: there are none, or they can't be read.
    """
    _check_wanted(subject)
    heldout = open_corpus(run_dir).heldout
    if heldout is None:
        raise UserError(
            f"{run_dir.config}: data.heldout is empty, and prompts that were trained on tell nothing: give it "
            "conversations that are not in data.train"
        )
    return {HELDOUT: heldout.prompts(), **benchmark_prompts(subject.config, subject.shape)}


def subject_of_draft(draft: Path, config: Config) -> Subject:
    """The measurement of a draft that no run of ours made.

    Args:
        draft: its directory, in any published form.
        config: names the target, ``data.heldout`` or ``evaluate.sets``, how it is measured, and where the result goes
            (``run.dir``). Its ``draft`` section is replaced by what the files say.

    Raises:
        UserError: the draft does not fit the target, or no prompts are named.
    """
    if not config.data.heldout and not config.evaluate.sets:
        raise UserError("--heldout: name files of conversations, or a benchmark: --sets.gsm8k FILE")
    shape = read_target(config.target.path)
    config = config_of(draft, check_draft(draft, shape), config)
    logs = Path(config.run.dir) / "logs"
    return Subject(config, config.evaluate, shape, algorithm_of(config, shape), draft, logs)


def prompts_of_draft(subject: Subject) -> Questions:
    """The prompts of the conversations in ``data.heldout``, and those of ``evaluate.sets``.

    Raises:
        UserError: they can't be read.
    """
    heldout = subject.config.data.heldout
    _check_wanted(subject)
    prompts = {HELDOUT: conversation_prompts(subject.config, subject.shape, heldout)} if heldout else {}
    return prompts | benchmark_prompts(subject.config, subject.shape)


def chosen_prompts(subject: Subject, prompts: Questions) -> tuple[Questions, list[str]]:
    """The prompts that are decoded, and warnings.

    Raises:
        UserError: settings and prompts do not fit together.
    """
    warnings = check_sweep(subject.config, subject.algorithm)
    questions, left_out = spread(prompts, subject)
    check_counts(subject, questions)
    if left_out:
        warnings.append(f"{left_out} prompts are too long for the target's context and were left out")
    return questions, warnings


def check_runs_on_cpu(subject: Subject, remedy: str) -> None:
    """Check that SGLang can measure a draft on a machine without an accelerator.

    Args:
        remedy: what to do if it can't, for the message.

    Raises:
        UserError: it can't.
    """
    if not runs_on_cpu(subject.algorithm, subject.settings.draft_tokens):
        raise UserError(f"{subject.draft}: SGLang does not run drafts of {subject.algorithm.title} on a CPU; {remedy}")


def _check_wanted(subject: Subject) -> None:
    if subject.settings.prompts < 1:
        raise UserError("evaluate.prompts is 0: nothing to measure")

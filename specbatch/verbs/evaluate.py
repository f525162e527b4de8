"""``specbatch evaluate``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.errors import UserError
from specbatch.rundir import EVALUATION_LOG, as_typed
from specbatch.verbs.options import in_file, log_to_stderr, run_dir_of, verb_parser
from specbatch.verbs.submit import tell, warn

if TYPE_CHECKING:
    from specbatch.config import Config
    from specbatch.evaluation.engines import Subject
    from specbatch.rundir import RunDir

STAGE = "slurm.stage_target"
"""The field of the job's section that the command in the job reads, too."""
USAGE = """\
specbatch evaluate RUN [--draft DIR] [--submit] [--FIELD VALUE ...]
       specbatch evaluate --draft DIR --target DIR [--heldout FILE ...] [--submit] [--FIELD VALUE ...]
       specbatch evaluate --draft DIR --config FILE [--submit] [--FIELD VALUE ...]"""


def evaluate(arguments: list[str]) -> int:
    """Measure a draft by real speculative decoding: a run's, or any for a target."""
    parser = verb_parser(evaluate)
    parser.usage = USAGE
    # Else the first value of an option that is none of the parser's own would be taken for the run.
    alone = any(word.partition("=")[0] in ("--target", "--config") for word in arguments)
    _add(parser, alone=alone)
    if any(word in ("-h", "--help") for word in arguments):
        from specbatch.config import Evaluate
        from specbatch.config.options import options_of

        for name, option in options_of(Evaluate).items():
            parser.add_argument(
                f"--{name}", metavar="VALUE", help=f"{option.text} That of the run or FILE if not given."
            )
    options, rest = parser.parse_known_args(arguments)
    if options.submit and options.json:
        raise UserError("--json: --submit queues a job and prints no result; leave one of them out")
    words = list(_long(rest, alone=alone, submit=options.submit))
    with _short_names():
        return (_any_draft if alone else _draft_of_run)(options, words)


def _add(parser: argparse.ArgumentParser, *, alone: bool) -> None:
    if not alone:
        parser.add_argument(
            "run", type=Path, metavar="RUN", help="A run directory; none where --target or --config is given."
        )
    parser.add_argument("--draft", type=Path, metavar="DIR", help="The draft; the run's export/ if not given.")
    parser.add_argument("--target", metavar="DIR", help="Without a run: the target that the draft is for.")
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="Without a run: a configuration that names target, held-out data, engine, `evaluate` and `slurm`; options "
        "here take precedence.",
    )  # fmt: skip
    parser.add_argument(
        "--heldout", nargs="+", default=[], metavar="FILE",
        help="Without a run: conversations whose first answers are decoded; else the prompts are those of `sets`.",
    )  # fmt: skip
    parser.add_argument(
        "--tensor_parallel", type=int, metavar="N", help="Without a run: GPUs of an engine; 1 if not given."
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="Without a run: directory for evaluation.json and logs; `evaluation-` and the draft's name if not given.",
    )  # fmt: skip
    parser.add_argument(
        "--submit", action="store_true",
        help="Measure in a Slurm job on one node with an engine's resources, and return at once. `--slurm.FIELD VALUE` "
        "changes what it asks for.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print evaluation.json.")


def _long(arguments: list[str], *, alone: bool, submit: bool) -> Iterator[str]:
    """The words of the command line with each option's full name: fields of ``evaluate`` need no section here.

    Raises:
        UserError: the option sets what a run has already, or belongs to a job.
    """
    from specbatch.config.algorithms import default_algorithm
    from specbatch.config.load import section_types

    sections = section_types(default_algorithm())
    for word in arguments:
        name = word.removeprefix("--").partition("=")[0]
        section = name.partition(".")[0]
        if not word.startswith("--"):
            yield word
        elif section not in sections:
            yield f"--evaluate.{word.removeprefix('--')}"
        elif section == "slurm" and not submit and name != STAGE:
            raise UserError(f"--{name}: belongs to --submit")
        elif section not in ("evaluate", "slurm") and not alone:
            raise UserError(f"--{name}: a run has its own; leave it out, or give --target in place of the run")
        else:
            yield word


@contextlib.contextmanager
def _short_names() -> Iterator[None]:
    """Name fields of ``evaluate`` in messages about the command line as they are named there."""
    from specbatch.config.options import COMMAND_LINE

    try:
        yield
    except UserError as error:
        if str(error).startswith(f"{COMMAND_LINE}: evaluate."):
            raise UserError(str(error).replace("evaluate.", "")) from error
        raise


def _draft_of_run(options: argparse.Namespace, words: list[str]) -> int:
    from specbatch.config import load_config

    for name in ("heldout", "out", "tensor_parallel"):
        if getattr(options, name):
            raise UserError(f"--{name}: a run has its own; leave it out, or give --target in place of the run")
    run_dir = run_dir_of(options.run)
    config = load_config(run_dir.config, words)
    if not options.submit:
        from specbatch.evaluation.serving import evaluate as measure

        log_to_stderr()
        with _staging(config):
            evaluation = measure(run_dir, draft=options.draft, settings=config.evaluate)
        return _print(evaluation, options.draft or run_dir.export, as_json=options.json)
    from specbatch.evaluation.subjects import chosen_prompts, prompts_of_run, subject_of_run
    from specbatch.slurm.evaluation_job import words_of

    tell("checking draft, target and prompts")
    subject = subject_of_run(run_dir, options.draft, config.evaluate)
    subject = replace(subject, config=replace(subject.config, slurm=config.slurm))
    _, warnings = chosen_prompts(subject, prompts_of_run(run_dir, subject))
    given = [".", *([f"--draft={options.draft.absolute()}"] if options.draft else [])]
    own = load_config(run_dir.config)
    given += words_of(config.evaluate, own.evaluate)
    if config.slurm.stage_target != own.slurm.stage_target:
        given.append(f"--{STAGE}={config.slurm.stage_target}")
    with in_file(run_dir.config):
        return _submit(subject, run_dir, given, words, warnings)


def _any_draft(options: argparse.Namespace, words: list[str]) -> int:
    if options.draft is None:
        raise UserError("--draft: is missing: name the draft's directory")
    from specbatch.rundir import RunDir

    run_dir = RunDir((options.out or Path(f"evaluation-{options.draft.resolve().name}")).absolute())
    with in_file(options.config) if options.config else contextlib.nullcontext():
        config = _config_of_target(options, run_dir, words)
        if not options.submit:
            from specbatch.evaluation.serving import evaluate_draft

            log_to_stderr()
            with _staging(config):
                evaluation = evaluate_draft(options.draft, config)
            return _print(evaluation, options.draft, as_json=options.json)
        from specbatch.evaluation.subjects import chosen_prompts, prompts_of_draft, subject_of_draft

        tell("checking draft, target and prompts")
        subject = subject_of_draft(options.draft, config)
        _, warnings = chosen_prompts(subject, prompts_of_draft(subject))
        given = ["--config=config.yaml", f"--draft={options.draft.absolute()}", "--out=."]
        keep = replace(config, slurm=replace(config.slurm, profile=""))
        return _submit(subject, run_dir, given, words, warnings, keep)


@contextlib.contextmanager
def _staging(config: Config) -> Iterator[None]:
    """On a node of a job, have engines read the target from a copy there if ``slurm.stage_target`` says so.

    The copy is removed afterwards. SIGTERM ends the process with the exit code that the job's script expects; a copy on
    a disk then stays for the requeued job.
    """
    import signal
    import sys

    from specbatch.inference.staging import removed_afterwards, use_stage

    if "SLURMD_NODENAME" in os.environ and config.slurm.stage_target:
        use_stage(config.slurm.stage_target)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with removed_afterwards(lambda: True):
        yield


def _config_of_target(options: argparse.Namespace, run_dir: RunDir, words: list[str]) -> Config:
    """The configuration of a measurement without a run; nothing is prepared, and nothing trained."""
    from specbatch.config import load_config

    given = [f"--run.dir={run_dir.root}", f"--data.cache_dir={run_dir.root / 'cache'}"]
    given += [f"--target.path={options.target}"] if options.target else []
    given += [f"--data.heldout={json.dumps(options.heldout)}"] if options.heldout else []
    given += [f"--inference.tensor_parallel={options.tensor_parallel}"] if options.tensor_parallel else []
    if options.config:
        return load_config(options.config, [*given, *words])
    with tempfile.TemporaryDirectory(prefix="specbatch-") as folder:
        empty = Path(folder) / "config.yaml"
        empty.touch()
        return load_config(empty, [*given, f"--data.train={json.dumps([str(run_dir.root)])}", *words])


def _submit(
    subject: Subject,
    run_dir: RunDir,
    given: list[str],
    words: list[str],
    warnings: list[str],
    keep: Config | None = None,
) -> int:
    """Queue the job, and print it and what comes next.

    Args:
        given: words of the job's command.
        words: words of this one.
        warnings: what was found so far.
        keep: as for `specbatch.slurm.evaluation_job.submit_evaluation`.
    """
    from specbatch.slurm.evaluation_job import submit_evaluation

    for warning in warnings:
        warn(warning)
    own_limit = any(word.partition("=")[0] == "--slurm.time" for word in words)
    number, job = submit_evaluation(subject, run_dir, given, warn, tell, own_limit=own_limit, keep=keep)
    shown, log = (shlex.quote(as_typed(path)) for path in (run_dir.root, run_dir.root / EVALUATION_LOG))
    print(f"job {number}: measures {as_typed(subject.draft.absolute())} on 1 node, for at most {job.slurm.time}")
    print(f"result: {run_dir.evaluation}")
    for command, does in (
        (f"specbatch status {shown}", "show its state, and then the result"),
        (f"tail -F {log}", "follow its log"),
        (f"scancel {number}", "end it"),
    ):
        print(f"  {command:40}  # {does}")
    return 0


def _print(evaluation: dict[str, Any], draft: Path, *, as_json: bool) -> int:
    from specbatch.evaluation.serving import report
    from specbatch.evaluation.summary import summary_line

    if as_json:
        print(json.dumps(evaluation, indent=2))
        return 0
    print("\n".join(report(evaluation)))
    print(summary_line(evaluation, draft))
    return 0

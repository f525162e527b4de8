"""The command: each verb reads its options, calls one function, and prints.

Exit codes: 0 done, 1 failed, 2 the user's mistake, 75 stopped with a snapshot and to be continued, 130 interrupted.
What a verb needs is imported when it is called, so that help comes at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch import __version__
from specbatch.errors import RunError, UserError

if TYPE_CHECKING:
    from specbatch.config import Config
    from specbatch.rundir import RunDir

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
PROGRESS_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _dispatch(arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"specbatch: {error}", file=sys.stderr)
        return MISTAKE
    except RunError as error:
        print(f"specbatch: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("specbatch: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough of it; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else MISTAKE
    if arguments[0] == "--version":
        print(f"specbatch {__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
        raise UserError(f"{verb}: there is no such verb; {hint}")
    return VERBS[verb](arguments[1:])


def _help() -> str:
    lines = [
        "usage: specbatch VERB [OPTIONS]",
        "",
        "Train the draft models of speculative decoding.",
        "",
        *(f"  {name:12}{_about(verb)}" for name, verb in VERBS.items()),
        "",
        "`specbatch VERB --help` says what a verb can be told; `specbatch --version` prints the version.",
    ]
    return "\n".join(lines)


def _about(verb: Callable[[list[str]], int]) -> str:
    return (verb.__doc__ or "").strip().splitlines()[0].rstrip(".")


# Verbs that take a configuration


def run(arguments: list[str]) -> int:
    """Run all components on this machine, from conversations to a measured draft."""
    options, rest = _config_verb("run", arguments)
    config = _read_config(options, rest)
    if config is None:
        return 0
    from specbatch.launch import local

    with _in_file(options.config):
        return local.run(config)


def data(arguments: list[str]) -> int:
    """Prepare the conversations, and show what the first ones become."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sample", type=int, default=3, metavar="N", help="How many to show. (default: 3)")

    options, rest = _config_verb("data", arguments, add)
    config = _read_config(options, rest)
    if config is None:
        return 0
    from specbatch.corpus.show import show

    with _in_file(options.config):
        show(config, options.sample)
    return 0


def _config_verb(
    verb: str, arguments: list[str], add: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> tuple[argparse.Namespace, list[str]]:
    """The options of a verb that takes a configuration, and those that stand for its fields."""
    parser = argparse.ArgumentParser(prog=f"specbatch {verb}", add_help=False, allow_abbrev=False)
    _add_config_options(parser)
    add(parser)
    if any(word in ("-h", "--help") for word in arguments):
        from specbatch.config.load import config_parser

        full = config_parser(f"specbatch {verb}", f"{_about(VERBS[verb])}.")
        full.usage = f"specbatch {verb} --config FILE [--SECTION.FIELD VALUE ...]"
        _add_config_options(full)
        add(full)
        full.print_help()
        raise SystemExit(0)
    return parser.parse_known_args(arguments)


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="The configuration, in YAML.")
    parser.add_argument(
        "--print_config", action="store_true", help="Print the whole configuration, explained, and end."
    )


def _read_config(options: argparse.Namespace, rest: list[str]) -> Config | None:
    """The configuration; None if it was only to be printed."""
    from specbatch.config import dump_config, load_config

    if options.config is None:
        raise UserError("--config: is missing: name the configuration file, as --config configs/quickstart.yaml")
    config = load_config(options.config, rest)
    if options.print_config:
        print(dump_config(config, explain=True), end="")
        return None
    return config


@contextlib.contextmanager
def _in_file(path: Path) -> Iterator[None]:
    """Say of which file a message speaks that begins with a field's name."""
    from specbatch.config.load import config_options

    sections = "|".join(dict.fromkeys(name.split(".")[0] for name in config_options()))
    try:
        yield
    except UserError as error:
        if re.match(rf"({sections})\.[\w.-]+: ", str(error)):
            raise UserError(f"{path}: {error}") from error
        raise


# Verbs that take a run directory


def resume(arguments: list[str]) -> int:
    """Go on with a run where its newest snapshot stands."""
    options = _run_verb("resume", arguments)
    from specbatch.launch import local

    return local.resume(options.run)


def status(arguments: list[str]) -> int:
    """Say how a run stands."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="Print the run's status.json.")

    options = _run_verb("status", arguments, add)
    from specbatch.rundir import read_json

    run_dir = _run_dir(options.run)
    state = read_json(run_dir.status)
    if state is None:
        raise UserError(
            f"{options.run}: the run has not been started yet; start it with `specbatch resume {options.run}`"
        )
    print(json.dumps(state, indent=2) if options.json else "\n".join(_status_lines(options.run, state)))
    return 0


def _status_lines(path: Path, state: dict[str, Any]) -> list[str]:
    stage = f", {state['stage']}" if state["state"] == "running" else ""
    lines = [
        f"{path}: {state['state']}{stage}, step {state['step']} of {state['steps']}, attempt {state['attempt']}, "
        f"as of {state['updated']}"
    ]
    lines += [f"  {state['why']}"] if state["why"] else []
    if state["state"] == "running":
        lines += [f"  {line}" for line in state["waiting"]]
    lines += [f"  pack {entry['pack']} was not trained: {entry['why']}" for entry in state["void"]]
    return lines


def export(arguments: list[str]) -> int:
    """Write a snapshot's draft as a Hugging Face directory that SGLang and vLLM load."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--step", type=int, metavar="N", help="Which snapshot; the newest whole one if not given.")
        parser.add_argument("--out", type=Path, metavar="DIR", help="Where to; the run's export/ if not given.")

    options = _run_verb("export", arguments, add)
    _log()
    from specbatch.export import export as write

    print(write(_run_dir(options.run), options.step, options.out))
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure a run's draft by real speculative decoding of held-out prompts."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--draft", type=Path, metavar="DIR", help="The draft; the run's export/ if not given.")
        parser.add_argument("--json", action="store_true", help="Print evaluation.json.")

    from specbatch.config.options import options_of
    from specbatch.config.sections import Evaluate

    fields = options_of(Evaluate)
    options, rest = _run_verb_known("evaluate", arguments, add, fields)
    import dataclasses

    from specbatch.config import load_config
    from specbatch.config.options import COMMAND_LINE, command_line, values_of

    run_dir = _run_dir(options.run)
    given = dict(command_line(rest, fields))
    values = values_of(given, fields, lambda name: COMMAND_LINE)
    settings = dataclasses.replace(load_config(run_dir.config).evaluate, **{name: values[name] for name in given})
    _log()
    from specbatch.evaluate import evaluate as measure
    from specbatch.evaluate import report, summary_line

    evaluation = measure(run_dir, draft=options.draft, settings=settings)
    if options.json:
        print(json.dumps(evaluation, indent=2))
        return 0
    print("\n".join(report(evaluation)))
    print(summary_line(evaluation, options.draft or run_dir.export))
    return 0


def _run_verb(
    verb: str, arguments: list[str], add: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    options, rest = _run_verb_known(verb, arguments, add, {})
    if rest:
        raise UserError(f"{rest[0]}: is no option of `specbatch {verb}`; see `specbatch {verb} --help`")
    return options


def _run_verb_known(
    verb: str, arguments: list[str], add: Callable[[argparse.ArgumentParser], None], fields: dict[str, Any]
) -> tuple[argparse.Namespace, list[str]]:
    """The options of a verb that takes a run directory, and what is left for `fields`."""
    parser = argparse.ArgumentParser(
        prog=f"specbatch {verb}", description=f"{_about(VERBS[verb])}.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="A run directory.")
    add(parser)
    if any(word in ("-h", "--help") for word in arguments):
        for name, option in fields.items():
            parser.add_argument(f"--{name}", metavar="VALUE", help=f"{option.text} The run's own if not given.")
    return parser.parse_known_args(arguments)


def _run_dir(path: Path) -> RunDir:
    from specbatch.rundir import RunDir

    run_dir = RunDir(path.absolute())
    if not run_dir.config.is_file():
        raise UserError(f"{path}: no run directory: it has no config.yaml; start a run with `specbatch run`")
    return run_dir


# Others


def regenerate(arguments: list[str]) -> int:
    """Have the target write the answers of conversations anew, for a draft to learn from."""
    from specbatch.config.options import options_of, parse_options, parser
    from specbatch.regenerate import Regenerate

    if any(word in ("-h", "--help") for word in arguments):
        fields = options_of(Regenerate)
        shown = parser("specbatch regenerate", f"{_about(regenerate)}.", {"options": ("", fields)})
        shown.usage = "specbatch regenerate --target DIR --input FILE --output FILE [--OPTION VALUE ...]"
        shown.print_help()
        return 0
    options = parse_options(Regenerate, arguments)
    from specbatch.inference.arguments import refuse_unknown

    refuse_unknown(options.sglang, "sglang")
    _log()
    from specbatch.regenerate import regenerate as generate

    summary = generate(options, _Rate())
    for reason, count in summary.skipped.items():
        print(f"skipped {count}: {reason}", file=sys.stderr)
    print(f"{summary.written} conversations of {summary.rows} rows in {options.output}")
    return 0


class _Rate:
    """Tells on stderr, now and then, how far the work is."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, done: int, total: int, tokens_per_s: float) -> None:
        if done < total and time.monotonic() - self._told < PROGRESS_S:
            return
        self._told = time.monotonic()
        print(f"{done} of {total} rows, {tokens_per_s:.0f} tokens/s", file=sys.stderr)


def _log() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "resume": resume,
    "status": status,
    "data": data,
    "regenerate": regenerate,
    "export": export,
    "evaluate": evaluate,
}

"""What verbs share: options for the fields of a configuration, run directories, help."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.errors import UserError

if TYPE_CHECKING:
    from specbatch.config import Config
    from specbatch.rundir import RunDir

Verb = Callable[[list[str]], int]
"""Takes the words after its name, prints, and returns the exit code. The first line of its docstring is its help."""
Add = Callable[[argparse.ArgumentParser], None]


def about(verb: Verb) -> str:
    """The first line of a verb's docstring, without its full stop."""
    return (verb.__doc__ or "").strip().splitlines()[0].rstrip(".")


def config_verb(
    verb: Verb, arguments: list[str], add: Add = lambda parser: None
) -> tuple[argparse.Namespace, list[str]]:
    """The options of a verb that takes a configuration, and the remaining words, which set fields."""
    parser = argparse.ArgumentParser(prog=f"specbatch {verb.__name__}", add_help=False, allow_abbrev=False)
    _add_config_options(parser)
    add(parser)
    if any(word in ("-h", "--help") for word in arguments):
        from specbatch.config.load import config_parser

        full = config_parser(f"specbatch {verb.__name__}", f"{about(verb)}.")
        full.usage = f"specbatch {verb.__name__} --config FILE [--SECTION.FIELD VALUE ...]"
        _add_config_options(full)
        add(full)
        full.print_help()
        raise SystemExit(0)
    return parser.parse_known_args(arguments)


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="The configuration, in YAML.")
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="Print the whole configuration with an explanation of each key, and end.",
    )


def read_config(options: argparse.Namespace, rest: list[str]) -> Config | None:
    """The configuration; None if it was printed instead (``--print_config``).

    Raises:
        UserError: it is missing, or wrong.
    """
    from specbatch.config import dump_config, load_config

    if options.config is None:
        raise UserError("--config: is missing: give the configuration file, as --config configs/quickstart.yaml")
    config = load_config(options.config, rest)
    if options.print_config:
        print(dump_config(config, explain=True), end="")
        return None
    return config


def keep_file(path: Path, config: Config) -> None:
    """Refuse a run that would overwrite the configuration file that it was given.

    Raises:
        UserError: it is the file in which the run directory keeps its own.
    """
    from specbatch.rundir import RunDir

    own = RunDir(Path(config.run.dir)).config
    if own.exists() and own.samefile(path):
        raise UserError(
            f"run.dir: {config.run.dir} is the directory of {path}, which the run would overwrite; to continue a run, "
            f"use `specbatch resume {config.run.dir}`, else give another run.dir"
        )


@contextlib.contextmanager
def in_file(path: Path) -> Iterator[None]:
    """Put the file's name in front of messages that begin with a field's name."""
    from specbatch.config.load import config_options

    sections = "|".join(dict.fromkeys(name.split(".")[0] for name in config_options()))
    try:
        yield
    except UserError as error:
        if re.match(rf"({sections})\.[\w.-]+: ", str(error)):
            raise UserError(f"{path}: {error}") from error
        raise


def plain_verb(verb: Verb, arguments: list[str], add: Add) -> argparse.Namespace:
    """The options of a verb that takes neither a configuration nor a single run.

    Raises:
        UserError: an option is not the verb's.
    """
    parser = argparse.ArgumentParser(
        prog=f"specbatch {verb.__name__}", description=f"{about(verb)}.", allow_abbrev=False
    )
    add(parser)
    options, rest = parser.parse_known_args(arguments)
    _refuse(verb, rest)
    return options


def run_verb(verb: Verb, arguments: list[str], add: Add = lambda parser: None) -> argparse.Namespace:
    """The options of a verb that takes a run directory.

    Raises:
        UserError: an option is not the verb's.
    """
    parser = verb_parser(verb)
    parser.add_argument("run", type=Path, metavar="RUN", help="A run directory.")
    add(parser)
    return no_more(verb, parser, arguments)


def verb_parser(verb: Verb) -> argparse.ArgumentParser:
    """A parser with the verb's name and description only."""
    return argparse.ArgumentParser(prog=f"specbatch {verb.__name__}", description=f"{about(verb)}.", allow_abbrev=False)


def no_more(verb: Verb, parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options of a verb that takes no others.

    Raises:
        UserError: one of them is not the verb's.
    """
    options, rest = parser.parse_known_args(arguments)
    _refuse(verb, rest)
    return options


def _refuse(verb: Verb, rest: list[str]) -> None:
    if rest:
        raise UserError(
            f"{rest[0]}: is not an option of `specbatch {verb.__name__}`; see `specbatch {verb.__name__} --help`"
        )


def run_verb_known(
    verb: Verb, arguments: list[str], add: Add, fields: dict[str, Any]
) -> tuple[argparse.Namespace, list[str]]:
    """The options of a verb that takes a run directory, and the remaining words, which set `fields`."""
    parser = verb_parser(verb)
    parser.add_argument("run", type=Path, metavar="RUN", help="A run directory.")
    add(parser)
    if any(word in ("-h", "--help") for word in arguments):
        for name, option in fields.items():
            parser.add_argument(f"--{name}", metavar="VALUE", help=f"{option.text} The run's own if not given.")
    return parser.parse_known_args(arguments)


def run_dir_of(path: Path) -> RunDir:
    """The run directory.

    Raises:
        UserError: it is not one.
    """
    from specbatch.rundir import RunDir

    run_dir = RunDir(path.absolute())
    if not run_dir.config.is_file():
        raise UserError(f"{path}: is not a run directory: it has no config.yaml; start a run with `specbatch run`")
    return run_dir


def log_to_stderr() -> None:
    """Print log messages to stderr, for verbs without a display of their own."""
    import logging
    import sys

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)

"""``specbatch regenerate``."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from specbatch.errors import UserError
from specbatch.verbs.options import about, in_file, keep_file

FLAGS = {
    "target": "target.path",
    "input": "data.train",
    "output": "run.dir",
    "dtype": "target.dtype",
    "trust_remote_code": "target.trust_remote_code",
    "template_variables": "data.template_variables",
    "seed": "run.seed",
    "engines": "inference.engines",
    "tensor_parallel": "inference.tensor_parallel",
    "threads": "inference.threads",
    "start_timeout_s": "inference.start_timeout_s",
    "sglang": "inference.sglang",
}
"""Short names of fields for this verb, besides those of `data.regenerate`, which need no section here."""
USAGE = """\
specbatch regenerate --target DIR --input FILE --output RUN [--FIELD VALUE ...]
       specbatch regenerate --config FILE [--SECTION.FIELD VALUE ...]"""


def regenerate(arguments: list[str]) -> int:
    """Have the target answer prompts itself, for a draft to learn from."""
    from specbatch.config.answers import Regenerate
    from specbatch.config.load import config_options
    from specbatch.config.options import options_of, parser

    if any(word in ("-h", "--help") for word in arguments):
        known = config_options()
        short = {name: known[field] for name, field in FLAGS.items()}
        text = "The run directory has a run's files, and the answers in RUN/answers. The same for a job of a cluster: "
        groups = {"answers": ("", options_of(Regenerate)), "fields of other sections": ("", short)}
        shown = parser("specbatch regenerate", f"{about(regenerate)}. {text}submit --run.goal answers.", groups)
        shown.usage = USAGE
        shown.print_help()
        return 0
    from specbatch.config import load_config
    from specbatch.run import local

    words = list(_long(arguments, list(options_of(Regenerate))))
    path = _value_of("--config", words)
    with tempfile.TemporaryDirectory(prefix="specbatch-") as folder:
        if path is None:
            for flag in ("target", "input", "output"):
                if not any(word.partition("=")[0] == f"--{FLAGS[flag]}" for word in words):
                    raise UserError(f"command line: {flag}: is missing: usage: {USAGE}")
            file = Path(folder) / "config.yaml"
            file.touch()
        else:
            file = Path(path)
        config = load_config(file, [*words, "--run.goal", "answers"])
    if Path(config.run.dir).suffix in (".jsonl", ".json", ".parquet"):
        raise UserError(
            f"--output: {config.run.dir} is the name of a file; give a run directory: the answers will be in "
            "its directory answers, as files of data.regenerate.format"
        )
    if path is None:
        if (Path(config.run.dir) / "config.yaml").exists():
            return local.resume(Path(config.run.dir), [*words, "--run.goal", "answers"])
        return local.run(config)
    with in_file(file):
        keep_file(file, config)
        return local.run(config)


def _long(arguments: list[str], own: list[str]) -> Iterator[str]:
    """The words of the command line with each option's full name.

    Raises:
        UserError: there is no such option.
    """
    for word in arguments:
        name, equals, text = word.removeprefix("--").partition("=")
        head, dot, rest = name.partition(".")
        if not word.startswith("--"):
            yield word
        elif head in FLAGS:
            yield f"--{FLAGS[head]}{dot}{rest}{equals}{text}"
        elif name in own:
            yield f"--data.regenerate.{name}{equals}{text}"
        elif "." in name or name == "config":
            yield word
        else:
            near = difflib.get_close_matches(name, [*own, *FLAGS, "config"], n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"command line: {name}: there is no such option{hint}")


def _value_of(option: str, words: list[str]) -> str | None:
    """Take an option and its value out of the words."""
    for index, word in enumerate(words):
        name, equals, text = word.partition("=")
        if name == option:
            value = text if equals else "".join(words[index + 1 : index + 2])
            del words[index : index + (1 if equals else 2)]
            if not value:
                raise UserError(f"{option}: has no value; name the configuration file")
            return value
    return None

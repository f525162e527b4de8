"""Generates the reference pages of the documentation from the code; mkdocs calls it while it builds (`mkdocs.yml`).

``reference/configuration.md`` has every key of a configuration, with its text, values and default, from
`specbatch.config`; ``reference/verbs.md`` has the help of every verb. They are not files of the repository, so they are
never out of date.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from specbatch.cli import VERBS, main
from specbatch.config.load import config_groups
from specbatch.config.options import Option
from specbatch.verbs.options import about

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

WIDTH = "100"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the reference pages: called by mkdocs."""
    from mkdocs.structure.files import File

    for name, text in (("configuration", configuration_page()), ("verbs", verbs_page())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def configuration_page() -> str:
    """Return all configuration keys as Markdown: one table per section, each row with an anchor of the key's name."""
    lines = [
        "# All configuration keys",
        "",
        "A configuration is a YAML file with a mapping for each section below. Every key can also be given on the",
        "command line, as `--training.learning_rate 5e-4`. `specbatch run --config FILE --print_config` prints a",
        "whole configuration, with this text above each key.",
    ]
    for title, (text, options) in config_groups().items():
        lines += ["", f"## {title}", "", " ".join(text.split()), "", "| key | default | |", "| --- | --- | --- |"]
        lines += [_row(name, option) for name, option in options.items()]
    return "\n".join(lines) + "\n"


def _row(name: str, option: Option) -> str:
    values = f" {option.values[:1].upper()}{option.values[1:]}." if option.values else ""
    text = f"{option.text}{values}".replace("|", "\\|")
    return f'| <a id="{name}"></a>`{name}` | {option.default_text} | {text} |'


def verbs_page() -> str:
    """Return the help of every verb as Markdown, without configuration keys if a verb accepts all of them."""
    lines = ["# All verbs", "", "`specbatch VERB --help` prints the same."]
    for name, verb in VERBS.items():
        shown, more = _help(name)
        lines += ["", f"## {name}", "", f"{about(verb)}.", "", "```text", *shown, "```"]
        if more:
            lines += ["", "And [every key of a configuration](configuration.md), as `--SECTION.FIELD VALUE`."]
    return "\n".join(lines) + "\n"


def _help(verb: str) -> tuple[list[str], bool]:
    """Return the lines of a verb's help without its description, and whether configuration keys were left out."""
    with _printed() as text, contextlib.suppress(SystemExit):
        main([verb, "--help"])
    lines = text.getvalue().rstrip().splitlines()
    keys = lines.index("run:") if "run:" in lines else len(lines)
    usage = lines.index("")
    first = next(i for i in range(usage + 1, len(lines)) if lines[i] == "")
    return [*lines[:usage], *lines[first:keys]], keys < len(lines)


@contextlib.contextmanager
def _printed() -> Iterator[io.StringIO]:
    """Capture what is printed, in lines of at most ``WIDTH`` characters."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield text
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before

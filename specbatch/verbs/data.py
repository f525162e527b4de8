"""``specbatch data``."""

from __future__ import annotations

import argparse

from specbatch.verbs.options import config_verb, in_file, read_config


def data(arguments: list[str]) -> int:
    """Prepare the conversations, and show the tokens and loss masks of the first ones."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--stats", action="store_true", help="Print statistics of the data instead of samples.")
        parser.add_argument(
            "--sample", type=int, default=3, metavar="N", help="Number of samples to show; 3 if not given."
        )
        parser.add_argument(
            "--template-report",
            action="store_true",
            help="Print which kinds of conversation can be learnt with the target's chat template, and end.",
        )

    options, rest = config_verb(data, arguments, add)
    config = read_config(options, rest)
    if config is None:
        return 0
    if options.template_report:
        from specbatch.corpus.report import template_report

        with in_file(options.config):
            print(template_report(config))
        return 0
    from specbatch.corpus.show import show

    with in_file(options.config):
        show(config, 0 if options.stats else options.sample, statistics=options.stats)
    return 0

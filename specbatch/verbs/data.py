"""``specbatch data``."""

from __future__ import annotations

import argparse

from specbatch.verbs.options import config_verb, in_file, read_config


def data(arguments: list[str]) -> int:
    """Prepare the conversations, and show what the first ones become."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sample", type=int, default=3, metavar="N", help="How many to show. (default: 3)")

    options, rest = config_verb(data, arguments, add)
    config = read_config(options, rest)
    if config is None:
        return 0
    from specbatch.corpus.show import show

    with in_file(options.config):
        show(config, options.sample)
    return 0

"""``specbatch init``."""

from __future__ import annotations

import argparse

from specbatch.errors import UserError


def init(arguments: list[str]) -> int:
    """Print a configuration to start from, for a target model and your GPUs."""
    parser = argparse.ArgumentParser(prog="specbatch init", description=init.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--target",
        required=True,
        metavar="DIR",
        help="A Hugging Face directory, or the name of a model in the hub's cache.",
    )
    parser.add_argument(
        "--gpus", required=True, metavar="KIND:N", help="Kind and number of the GPUs of a node, as h100:8."
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="Number of nodes with GPUs; 1 if not given.")
    options = parser.parse_args(arguments)
    kind, _, count = options.gpus.partition(":")
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"--gpus: {options.gpus}: write the kind and the number in a node, as h100:8")
    if options.nodes < 1:
        raise UserError(f"--nodes: {options.nodes}: at least one is needed")
    from specbatch.initial import AvailableNodes, initial
    from specbatch.initial.document import document

    print(document(initial(options.target, AvailableNodes(kind.lower(), int(count), options.nodes))), end="")
    return 0

"""``specbatch run`` and ``specbatch resume``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from specbatch.errors import UserError
from specbatch.verbs.options import config_verb, in_file, keep_file, read_config, run_dir_of, run_verb_known

if TYPE_CHECKING:
    from specbatch.slurm.allocation import Allocation

NODES = "the nodes of the Slurm allocation in which this is called, as `salloc` gives one"


def run(arguments: list[str]) -> int:
    """Run everything from conversations to a measured draft, on this machine or the nodes that you have there."""

    def add(parser: argparse.ArgumentParser) -> None:
        where = f"Run on this machine, or on {NODES}; if not given, on those where there are some."
        parser.add_argument("--on", choices=["here", "nodes"], help=where)

    options, rest = config_verb(run, arguments, add)
    config = read_config(options, rest)
    if config is None:
        return 0
    from specbatch.config import load_config
    from specbatch.run import local
    from specbatch.slurm.allocation import overrides_for

    with in_file(options.config):
        keep_file(options.config, config)
        allocation = _allocation(options.on, ["run", *arguments])
        if allocation is not None:
            config = load_config(options.config, [*rest, *overrides_for(config, allocation)])
        return local.run(config, allocation)


def _allocation(on: str | None, words: list[str]) -> Allocation | None:
    """The allocation whose nodes the components run on; None: they are processes of this machine.

    If the allocation's only node is another machine, the command continues there and this function does not return.

    Args:
        words: of the command.

    Raises:
        UserError: nodes were asked for, and there is no allocation.
    """
    from specbatch.slurm.allocation import enter_node, read_allocation

    found = None if on == "here" else read_allocation()
    if found is None:
        if on == "nodes":
            raise UserError(
                "--on: nodes: this is no allocation of Slurm's; get one with `salloc`, or queue the run with "
                "`specbatch submit`"
            )
        return None
    if found.nodes > 1:
        return found
    if not found.on_node:
        enter_node(found, [sys.executable, "-m", "specbatch", *words, "--on=here"])
    return None


def resume(arguments: list[str]) -> int:
    """Continue a run from its newest snapshot; settings that do not change what is trained may be different."""
    from specbatch.config.change import may_change
    from specbatch.config.load import config_options

    def add(parser: argparse.ArgumentParser) -> None:
        where = f"Continue as a Slurm job, on this machine, or on {NODES}; if not given, as it was started."
        parser.add_argument("--on", choices=["slurm", "here", "nodes"], help=where)

    fields = {name: option for name, option in config_options().items() if may_change(name)}
    options, rest = run_verb_known(resume, arguments, add, fields)
    from specbatch.run import local
    from specbatch.slurm import submit as submitting

    run_dir = run_dir_of(options.run)
    if options.on == "slurm" and run_dir.recording.exists():
        raise UserError(
            f"--on: {run_dir.root} trains on recorded steps, which needs no job of several components: run `specbatch "
            "resume` on this machine, or in a job of your own"
        )
    if options.on in ("here", "nodes") or not (options.on or submitting.was_submitted(run_dir)):
        here = run_dir.recording.exists() or options.on == "here"
        return local.resume(options.run, rest, None if here else _allocation(options.on, ["resume", *arguments]))
    from specbatch.config import load_config
    from specbatch.verbs.submit import print_next, warn

    with in_file(run_dir.config):
        job = submitting.resume(run_dir, rest, warn)
    if job is None:
        result = local.result_of(run_dir, load_config(run_dir.config))
        print(f"{options.run}: this run is complete: what it made is in {result}")
    else:
        print_next(job, load_config(run_dir.config))
    return 0

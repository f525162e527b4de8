"""Runs all checks of one task of a component: ``python -m specbatch.doctor.task COMPONENT``, in the doctor's directory.

Tasks find each other by files in that directory, which is one of the checks. Each writes ``findings/COMPONENT-N.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import msgspec

from specbatch.config import load_config
from specbatch.config.engine_nodes import nodes_per_engine
from specbatch.doctor import engine, gpu, network, store
from specbatch.doctor.finding import Finding, guarded, not_checked, write_findings
from specbatch.doctor.site import NODE, QUICK, CheckTask, devices, sources
from specbatch.doctor.trial import ATTEMPT, OF_RUN
from specbatch.errors import UserError
from specbatch.free_ports import use_ports
from specbatch.inference.arguments import start_timeout_s
from specbatch.inference.staging import removed_afterwards, use_stage
from specbatch.run.address import name_interface, node_address
from specbatch.run.head import serving
from specbatch.rundir import RunDir
from specbatch.target import read_target

ENGINES_ENDED = "engines-ended"
"""File that exists once all engines' tasks have ended."""
LONGEST_S = 600.0
"""Seconds for engines in addition to their start."""


def examine(place: CheckTask) -> list[Finding]:
    """Return the findings of one task, which are also written as they come."""
    use_ports(place.config.slurm.ports)
    findings: list[Finding] = []
    path = place.root / "findings" / f"{place.component}-{place.task}.json"

    def add(more: list[Finding]) -> None:
        findings.extend(more)
        write_findings(path, findings)

    add([Finding("node", socket.gethostname())])
    for what, check in (*QUICK, *NODE):
        add(guarded(what, lambda check=check: check(place)))  # type: ignore[misc]
    add(guarded("the run's data", lambda: _data_of_run(place)))
    try:
        address = node_address(place.config.slurm.interface, place.others)
    except UserError:
        return findings  # it is among the findings already
    name_interface(address)
    with contextlib.ExitStack() as stack:
        if place.component == "head":
            add(guarded("store's master", lambda: _lead(place, address, stack)))
        if place.local == 0:
            stack.enter_context(network.listening(place, address))
            add(guarded("network", lambda: network.reach(place)))
        if place.component == "inference":
            add(_infer(place, address))
        if place.component == "training":
            add(_train(place, address, stack))
        if place.component != "inference":
            _wait_for_engines(place)
    return findings


def _data_of_run(place: CheckTask) -> Finding:
    """Check the data of the run itself: the trial's are made up."""
    found = sources(load_config(place.root / OF_RUN))
    return msgspec.structs.replace(found, what="the run's data")


def _lead(place: CheckTask, address: str, stack: contextlib.ExitStack) -> Finding:
    """Start what the head of a run starts."""
    stack.enter_context(serving(RunDir(place.root), ATTEMPT, place.config, address))
    return Finding("store's master", f"listens on {address}, and so does the dispatcher", "started")


def _infer(place: CheckTask, address: str) -> list[Finding]:
    """Run the checks of an engine, or of a node's part of it."""
    found = guarded("target's class", lambda: engine.served(place))
    found += guarded("GPUs for torch", lambda: gpu.usable(place))
    found += guarded("store", lambda: store.round_trip(place))
    if why := _why_not(place, found):
        return [*found, *(not_checked(what, why) for what in ("engine", engine.CAPTURED, engine.RATE))]
    use_stage(place.config.slurm.stage_target if place.slurm else "")
    with removed_afterwards(lambda: True):
        return found + guarded("engine", lambda: engine.captures(place, address))


def _train(place: CheckTask, address: str, stack: contextlib.ExitStack) -> list[Finding]:
    """Run the checks of a training node, whose memory is lent to the store meanwhile."""
    from specbatch.doctor.ranks import ranks

    found = guarded("store's memory", lambda: stack.enter_context(store.lending(place)))
    found += guarded("GPUs for torch", lambda: gpu.usable(place))
    if why := _why_not(place, found):
        names = ("attention", "all-reduce", "training step", "memory of a rank", "snapshot")
        return [*found, *(not_checked(what, why) for what in names)]
    return found + guarded("training step", lambda: ranks(place, address))


def _why_not(place: CheckTask, found: list[Finding]) -> str:
    """Return why the rest of a component's checks can't be made; empty if they can."""
    if not place.slurm and getattr(place.config.slurm, place.component).gpus_per_node and not devices():
        return "this machine has no GPU, but the job requests some: --submit checks there"
    if not place.slurm and place.component == "inference" and (nodes := nodes_per_engine(place.config)) > 1:
        return f"an engine spans {nodes} nodes: --submit checks there"
    return "see above" if any(finding.verdict == "failed" and finding.what in _NEEDED for finding in found) else ""


_NEEDED = ("target's class", "GPUs for torch", "store")
"""Checks without which neither engines nor ranks can be started."""


def _wait_for_engines(place: CheckTask) -> None:
    """Wait for the file that says that the engines' tasks have ended, since they use this task's part of the store."""
    target = read_target(place.config.target.path)
    until = time.monotonic() + start_timeout_s(place.config, target) + LONGEST_S
    while not (place.root / ENGINES_ENDED).exists() and time.monotonic() < until:
        time.sleep(0.3)


def main(words: list[str] | None = None) -> int:
    """Run one task; return its exit code, which does not depend on the findings."""
    parser = argparse.ArgumentParser(prog="specbatch.doctor.task")
    parser.add_argument("component", choices=("head", "inference", "training"))
    parser.add_argument("--here", action="store_true", help="All components are on this machine.")
    parser.add_argument("--task", type=int, default=int(os.environ.get("SLURM_PROCID", "0")))
    options = parser.parse_args(words)
    root = Path.cwd()
    local = options.task if options.here else int(os.environ.get("SLURM_LOCALID", "0"))
    others = () if options.here else (os.environ.get("SPECBATCH_HEAD", ""),)
    config = load_config(root / "config.yaml")
    examine(
        CheckTask(config, options.component, root, options.task, local, tuple(filter(None, others)), not options.here)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

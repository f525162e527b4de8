"""``specbatch inspect``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from specbatch.verbs.options import plain_verb

if TYPE_CHECKING:
    from specbatch.snapshot.inspect import Inspected


def inspect(arguments: list[str]) -> int:
    """Show and verify snapshots and recordings: a file, a directory, or all of a run."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "path", type=Path, metavar="PATH", help="An HDF5 file, the directory of a step, or a run directory."
        )
        parser.add_argument("--json", action="store_true", help="Print the result as JSON.")

    options = plain_verb(inspect, arguments, add)
    from specbatch.snapshot.inspect import inspect as look

    found = look(options.path)
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    else:
        for one in found:
            print("\n".join(_lines(one, whole=len(found) == 1)))
    return 1 if any(one.damage for one in found) else 0


def _lines(one: Inspected, *, whole: bool) -> list[str]:
    about = ", ".join(f"{key} {one.about[key]}" for key in ("step", "ranks", "rank") if key in one.about)
    state = f"{len(one.damage)} DAMAGED" if one.damage else "whole"
    told = f"{one.kind}{f' ({about})' if about else ''}, {len(one.tensors)} tensors, {one.bytes} bytes: {state}"
    lines = [f"{one.path}: {told}"]
    if whole:
        width = max((len(tensor.name) for tensor in one.tensors), default=0)
        lines += [f"  {tensor.name:{width}}  {tensor.dtype} {tensor.shape}" for tensor in one.tensors]
        lines += [f"  {key}: {json.dumps(one.about[key])}" for key in ("facts", "values", "line") if key in one.about]
    return lines + [f"  {problem}" for problem in one.damage]

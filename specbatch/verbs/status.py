"""``specbatch status``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from specbatch.errors import UserError
from specbatch.verbs.options import run_dir_of, run_verb


def status(arguments: list[str]) -> int:
    """Say how a run stands."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="Print the run's status.json.")

    options = run_verb(status, arguments, add)
    from specbatch.rundir import read_json

    run_dir = run_dir_of(options.run)
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

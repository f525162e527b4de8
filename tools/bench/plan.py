#!/usr/bin/env python3
"""Compares the estimates of ``specbatch plan`` for a finished run with what it took.

    tools/quickstart && tools/bench/plan.py runs/quickstart

Rates come from the run itself, or from another of the same layout (--like), so the comparison tests the model of the
pipeline and of each step's cost. The first step, which includes one-time costs, is left out on both sides. The last
line is JSON; the exit code is 1 if the two are further apart than --within.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]  # so that a checkout is enough


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run that trained all its steps")
    parser.add_argument("--like", type=Path, help="a run that shows the rates; the run itself if not given")
    parser.add_argument("--within", type=float, default=0.25, help="how far apart the two may be; 0.25 if not given")
    options = parser.parse_args()
    found = compare(options.run.absolute(), (options.like or options.run).absolute())
    print(
        f"{found['steps']} steps, {found['tokens']} tokens: planned {found['planned_s']:.1f} s after the first step's "
        f"packs (engines {found['engines_s']:.1f} s, ranks {found['ranks_s']:.1f} s), took {found['took_s']:.1f} s"
    )
    print(json.dumps(found))
    return int(abs(found["ratio"] - 1) > options.within)


def compare(run: Path, like: Path) -> dict[str, Any]:
    """Plan a run from the rates of another, and read what it took."""
    from specbatch.config import load_config
    from specbatch.metrics_lines import read_metrics
    from specbatch.planning import Known, budget
    from specbatch.rundir import RunDir

    run_dir = RunDir(run)
    planned = budget(load_config(run_dir.config), Known(like=like))
    work, times = planned.work, planned.times
    rows = {row.step: row for row in read_metrics(run_dir.metrics)}
    if len(rows) != work.steps:
        raise SystemExit(f"{run}: {len(rows)} of {work.steps} steps are trained")
    tokens = sum(row.tokens for row in rows.values())
    timed = [row for step, row in rows.items() if step > 1]
    took_s = sum(row.seconds for row in timed) * tokens / sum(row.tokens for row in timed)
    took_s += sum(row.evaluation["seconds"] for row in rows.values() if row.evaluation)
    planned_s = times.total_s - times.fill_s
    return {
        "steps": work.steps,
        "tokens": tokens,
        "planned_tokens": work.tokens,
        "planned_s": planned_s,
        "engines_s": times.engines_s,
        "ranks_s": times.ranks_s,
        "took_s": took_s,
        "ratio": planned_s / took_s,
    }


if __name__ == "__main__":
    raise SystemExit(main())

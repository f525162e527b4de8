#!/usr/bin/env python3
"""Measures seconds and megabytes of ``specbatch report`` on generated runs: of 1,000 and 100,000 steps, and 20 runs.

    .venv/bin/python tools/bench/report.py

Each report is made by a separate process, as by a user. The last line is JSON; the exit code is 1 if a page is
larger than a megabyte.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]  # so that it runs from a checkout

LARGEST_BYTES = 1_000_000
CASES = {"1k steps": (1_000, 1), "100k steps": (100_000, 1), "20 runs of 10k steps": (10_000, 20)}
"""Number of steps and runs of each case."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="directory for runs and pages; a temporary one if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(name, *case, root=options.keep or Path(folder)) for name, case in CASES.items()]
    for each in found:
        print(
            f"{each['case']:22}{each['read_mb']:8.1f} MB of metrics and events, {each['seconds']:5.1f} s, "
            f"{each['page_mb']:.2f} MB"
        )
    print(json.dumps(found))
    return int(any(each["page_mb"] > LARGEST_BYTES / 1e6 for each in found))


def measure(name: str, steps: int, runs: int, root: Path) -> dict[str, Any]:
    """Make run directories and time the command."""
    from tests.report.synthetic import make_run

    folder = root / name.replace(" ", "-")
    paths = [folder / f"run-{i}" for i in range(runs)]
    for i, path in enumerate(paths):
        make_run(path, steps, seed=i, every=max(20, steps // 100), attempts=min(5, steps // 100))
    page = folder / "report.html"
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "specbatch", "report", *map(str, paths), "--output", str(page)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "state")},
        stdout=subprocess.DEVNULL,
    )
    read = [file for path in paths for file in (path / "metrics.jsonl", *path.glob("attempts/*/events.jsonl"))]
    return {
        "case": name,
        "read_mb": round(sum(file.stat().st_size for file in read) / 1e6, 1),
        "seconds": round(time.monotonic() - began, 2),
        "page_mb": round(page.stat().st_size / 1e6, 3),
    }


if __name__ == "__main__":
    sys.exit(main())

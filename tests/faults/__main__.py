"""``tools/faults``: see ``--help``."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.campaign import Campaign
from tests.faults.table import table
from tests.tiny_target import make_tiny_target


def say(text: str) -> None:
    """A line for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    """Disturb runs until so many faults were injected; 1 if one did not recover or came to something else."""
    parser = argparse.ArgumentParser(
        prog="tools/faults",
        description="Disturb runs of a tiny target on purpose, from a seed, and compare what they come to, bit for "
        "bit, with a run that was not disturbed.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of kinds, order and details.")
    parser.add_argument("--faults", type=int, default=100, help="How many.")
    parser.add_argument("--faults-per-run", type=int, default=60, help="Most of one run.")
    parser.add_argument("--steps", type=int, default=150, help="Of each run.")
    parser.add_argument("--evaluate-every", type=int, default=8, help="Runs between two whose evaluator is killed.")
    parser.add_argument("--minutes", type=float, default=1e9, help="Begin no run after so long.")
    parser.add_argument("--table", type=Path, help="Where the table goes, besides standard output.")
    parser.add_argument("--folder", type=Path, help="For the runs; a temporary one if not given.")
    options = parser.parse_args()
    # So that nothing of a run is left when this is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="specbatch-faults-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "target"
        campaign = Campaign(folder, make_tiny_target(target), options.seed, options.steps, say)
        failure = None
        try:
            expected = campaign.undisturbed()
            while campaign.injected() < options.faults and time.monotonic() - began < 60 * options.minutes:
                left = min(options.faults_per_run, options.faults - campaign.injected())
                prompts = 2 if campaign.runs % options.evaluate_every == options.evaluate_every - 1 else 0
                campaign.disturb(left, expected, prompts)
        except AssertionError as error:
            failure = error
    found = f"Seed {options.seed}, {campaign.injected()} faults in {campaign.runs} runs of {options.steps} steps.\n\n"
    found += table(campaign.tallies)
    print(found)
    if options.table:
        options.table.write_text(found)
    if failure is not None:
        print(failure, file=sys.stderr)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())

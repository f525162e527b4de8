"""``tools/faults``: see ``--help``."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.simulation import simulate
from tests.faults.table import simulated, summed, table

SAY_S = 20.0


def main() -> int:
    """Disturb runs, or simulated ones, until so many faults happened; 1 if something that must hold did not."""
    parser = argparse.ArgumentParser(
        prog="tools/faults",
        description="Disturb runs of a tiny target on purpose, from a seed, and compare what they come to, bit for "
        "bit, with a run that was not disturbed. With --simulate: put faults to the dispatcher's state machine, with "
        "everything around it simulated.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of kinds, order and details.")
    parser.add_argument("--faults", type=int, default=100, help="How many.")
    parser.add_argument("--faults-per-run", type=int, default=60, help="Most of one run.")
    parser.add_argument("--seconds-per-run", type=float, default=1e9, help="After so long in a run, no fault is begun.")
    parser.add_argument("--steps", type=int, default=150, help="Of each run.")
    parser.add_argument("--evaluate-every", type=int, default=8, help="Runs between two whose evaluator is killed.")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="Begin no run after so long, simulated ones included."
    )
    parser.add_argument("--simulate", type=int, metavar="N", help="So many faults, simulated.")
    parser.add_argument(
        "--sum", type=Path, nargs="+", metavar="FOLDER", help="Disturb nothing: one table of what these folders count."
    )
    parser.add_argument("--table", type=Path, help="Where the table goes, besides standard output.")
    parser.add_argument("--folder", type=Path, help="For the runs, and to go on with them; temporary if not given.")
    options = parser.parse_args()
    # So that nothing of a run is left when this is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failure = None
    if options.sum:
        found = summed(options.sum)
    elif options.simulate:
        found = _simulate(options)
    else:
        found, failure = _disturb(options)
    print(found)
    if options.table:
        options.table.write_text(found)
    if failure is not None:
        print(failure, file=sys.stderr)
    return 1 if failure else 0


def _simulate(options: argparse.Namespace) -> str:
    """Raise what broke, with the seed of the run."""
    began = told = time.monotonic()
    for stats in simulate(options.seed, options.simulate):
        if time.monotonic() - told > SAY_S:
            told = time.monotonic()
            say(f"{stats.faults.total()} faults")
        if time.monotonic() - began > 60 * options.minutes:
            break
    return simulated(stats, options.seed, time.monotonic() - began)


def _disturb(options: argparse.Namespace) -> tuple[str, AssertionError | None]:
    from tests.faults.campaign import Campaign
    from tests.tiny_target import make_tiny_target

    began = time.monotonic()
    failure = None
    with tempfile.TemporaryDirectory(prefix="specbatch-faults-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "target"
        if not target.exists():
            make_tiny_target(target)
        campaign = Campaign(folder, target, options.seed, options.steps, say)
        try:
            expected = campaign.undisturbed()
            while campaign.injected() < options.faults and time.monotonic() - began < 60 * options.minutes:
                left = min(options.faults_per_run, options.faults - campaign.injected())
                prompts = 2 if campaign.runs % options.evaluate_every == options.evaluate_every - 1 else 0
                campaign.disturb(left, expected, prompts, options.seconds_per_run)
        except AssertionError as error:
            failure = error
    head = f"Seed {options.seed}: {campaign.injected()} faults in {campaign.runs} runs of {options.steps} steps.\n\n"
    return head + table(campaign.tallies), failure


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

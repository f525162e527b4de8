"""``python -m tools.targets [NAME...]``: prints a table, and a summary as JSON in the last line.

Each target takes a minute on two cores: it starts an engine and a trainer, and then one server.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.targets.chain import Row, run_chain
from tools.targets.checkpoints import ARCHITECTURES


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| target | class | rows differ by | losses | same answers | seconds | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        difference = "" if row.difference is None else f"{row.difference:.1e}"
        losses = ", ".join(f"{loss:.3f}" for loss in row.losses)
        said = "right" if row.right else row.why
        cells = (row.name, row.architecture, difference, losses, row.identical, f"{row.seconds:.0f}", said)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """Return JSON with the number of targets, the number that passed, and why the others did not."""
    refused = {row.name: row.why for row in rows if not row.right}
    return json.dumps({"targets": len(rows), "right": sum(row.right for row in rows), "refused": refused})


def kept_rows(results: Path) -> dict[str, Row]:
    """Return the newest row of each target in a file of results, in the order of targets; empty without a file."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    found = {told["name"]: Row(**{**told, "losses": tuple(told["losses"])}) for told in map(json.loads, lines)}
    return {name: found[name] for name in ARCHITECTURES if name in found}


def main() -> None:
    """Run the chain for the named targets, or for all that have no row yet."""
    parser = argparse.ArgumentParser(prog="tools.targets", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}; all if none is given")
    parser.add_argument("--dir", type=Path, help="directory for everything; later calls continue from it")
    parser.add_argument(
        "--results", type=Path,
        help="rows are added to this file, and the table is of all in it; without names, targets that have a row in it "
        "are not run again",
    )  # fmt: skip
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in ARCHITECTURES]:
        parser.error(f"{', '.join(unknown)}: no such target; there are {', '.join(ARCHITECTURES)}")
    with tempfile.TemporaryDirectory(prefix="specbatch-targets-") as temporary:
        results = options.results or Path(temporary) / "results.jsonl"
        for name in options.names or [name for name in ARCHITECTURES if name not in kept_rows(results)]:
            folder = (options.dir or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            row = run_chain(name, folder)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
            print(table([row]).splitlines()[-1], flush=True)
        rows = list(kept_rows(results).values())
    print(f"\n{table(rows)}\n\n{summary(rows)}")


if __name__ == "__main__":
    main()

"""Checks the first rows of the data in a separate process: ``python -m specbatch.slurm.first_rows CONFIG``.

transformers imports torch if it finds it, which takes many seconds on a login node, although tokenizers do not need it.
So torch is hidden from it here where nothing needs it. Prints what `check_first_rows` returns or raises, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from specbatch.config import Config, dump_config, load_config
from specbatch.errors import UserError
from specbatch.target.without_torch import without_torch


@dataclass(frozen=True)
class FirstLook:
    """The result of checking the first rows."""

    warnings: list[str]
    left_s: tuple[float, float] | None
    """Seconds of preparing the data, by one process and by as many as are used on this host; None if it is prepared
    already."""
    image_folders: list[Path]
    """Directories of the images in these rows."""


def check_first_rows(config: Config) -> FirstLook:
    """Call `specbatch.corpus.try_first_rows` and `specbatch.room.check_first` without torch. Raises the same as
    these."""
    with tempfile.TemporaryDirectory(prefix="specbatch-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config))
        ran = subprocess.run(
            [sys.executable, "-m", __name__, path], capture_output=True, text=True, errors="replace", check=False
        )
    try:
        found = json.loads(ran.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise UserError(f"data.train: the first rows could not be read:\n{ran.stderr.strip()}") from error
    if "error" in found:
        raise UserError(found["error"])
    left_s = None if found["left_s"] is None else tuple(found["left_s"])
    return FirstLook(found["warnings"], left_s, [Path(folder) for folder in found["image_folders"]])


def main(path: Path) -> int:
    """Run the process; return its exit code."""
    from specbatch.corpus import Corpus, left_to_do, try_first_rows
    from specbatch.room import check_first

    config = load_config(path)
    without_torch(config)
    folders: set[str] = set()

    def look(corpus: Corpus, whole: bool) -> None:
        check_first(config, corpus, whole)
        folders.update(map(str, corpus.image_folders()))

    try:
        first = try_first_rows(config, look)
        left_s = left_to_do(config, first)
        print(json.dumps({"warnings": first.warnings, "left_s": left_s, "image_folders": sorted(folders)}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

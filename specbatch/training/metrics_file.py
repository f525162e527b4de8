"""``metrics.jsonl``: one line for each trained step, and each step once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from specbatch.evaluations import evaluation_text
from specbatch.rundir import write_whole

log = logging.getLogger(__name__)


class MetricsFile:
    """``metrics.jsonl``: each step once, however often it was trained.

    Args:
        trained: steps that are done; what the file says of later ones is removed first.
    """

    def __init__(self, path: Path, trained: int) -> None:
        kept = [line for line in _lines(path) if _step(line) <= trained]
        write_whole(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, line: dict[str, Any]) -> None:
        """Append one step. What a full disk has no room for is kept, and written when it has."""
        self._unwritten += json.dumps(line).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            log.error("METRICS NOT WRITTEN, kept until there is room bytes=%d why=%s", len(self._unwritten), error)
        accuracy, loss = line["accuracy"][0], line["loss"]
        log.info(
            "trained step=%d loss=%s accuracy=%s grad_norm=%.3f rate=%.3g tokens=%d seconds=%.2f waited_s=%.2f",
            line["step"], "none" if loss is None else f"{loss:.4f}", "none" if accuracy is None else f"{accuracy:.3f}",
            line["grad_norm"], line["learning_rate"], line["tokens"], line["seconds"], line["wait_s"],
        )  # fmt: skip
        if "evaluation" in line:
            log.info("evaluated step=%d %s", line["step"], evaluation_text(line["evaluation"]))


def last_step(path: Path) -> int:
    """The highest step that the file tells of; 0 if there is none."""
    return max((_step(line) for line in _lines(path)), default=0)


def _lines(path: Path) -> list[str]:
    """Whole lines; the last one may have been cut off by a crash."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line.endswith("}")]


def _step(line: str) -> int:
    return int(json.loads(line)["step"])

"""Writes ``metrics.jsonl``: exactly one line for each trained step."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from specbatch.evaluation.history import evaluation_text
from specbatch.metrics_lines import read_metrics, whole_lines
from specbatch.rundir import write_whole

log = logging.getLogger(__name__)


class MetricsFile:
    """Writes ``metrics.jsonl``, in which each step stands once, however often it was trained.

    Args:
        trained: steps that are done; lines of later ones are removed first.
    """

    def __init__(self, path: Path, trained: int) -> None:
        kept = zip(whole_lines(path), read_metrics(path), strict=True)
        write_whole(path, b"".join(text for text, line in kept if line.step <= trained))
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, line: dict[str, Any]) -> None:
        """Append one step. Lines that a full disk has no room for are kept in memory until it has."""
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

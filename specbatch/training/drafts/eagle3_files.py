"""EAGLE-3 in files (`specbatch.training.drafts.Files`)."""

from __future__ import annotations

from specbatch.training.drafts.configuration import draft_config
from specbatch.training.drafts.published import read_published, shapes, starting_tensors

__all__ = ["SGLANG", "TITLE", "draft_config", "read_published", "shapes", "starting_tensors"]

TITLE = "EAGLE-3"
SGLANG = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1}

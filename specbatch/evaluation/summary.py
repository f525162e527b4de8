"""A measurement in one line, without the libraries that measure: `specbatch status` prints it too."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any


def summary_line(evaluation: dict[str, Any], export: Path) -> str:
    """The result in one line: ``acceptance length 1.93 (plain decoding 1.00), output identical on 40 of 40 prompts,
    draft in runs/quickstart/export``.

    Args:
        evaluation: content of ``evaluation.json``.
        export: the draft's directory; shown relative to the current one if it is inside.
    """
    with contextlib.suppress(ValueError):
        export = export.resolve().relative_to(Path.cwd())
    if "identical" not in evaluation:
        return f"acceptance length {evaluation['acceptance_length']:.2f} from stored states, draft in {export}"
    return (
        f"acceptance length {evaluation['acceptance_length']:.2f} (plain decoding 1.00), output identical on "
        f"{evaluation['identical']} of {evaluation['prompts']} prompts, draft in {export}"
    )

"""The first rows of the data, tried before a job is queued: most mistakes in data are in all of its rows."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

from specbatch.config import Config
from specbatch.corpus.convert import convert_rows
from specbatch.corpus.prepare import judge, rows_of
from specbatch.corpus.sources import find_sources
from specbatch.corpus.tokenizer import load_tokenizer, tokenizer_size
from specbatch.corpus.write import PartWriter
from specbatch.errors import UserError

FIRST_ROWS = 500
"""Of the training and of the held-out data each: two seconds on one core, which a login node can bear."""


def try_first_rows(config: Config) -> list[str]:
    """Convert the first rows as `prepare` would, and throw the result away.

    Returns:
        warnings: of the first rows too many are unusable, but not all, and there are more.

    Raises:
        UserError: nothing can be made of them, or files or tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(config)
    warnings = []
    for title, names in (("training", config.data.train), ("held-out", config.data.heldout)):
        if not names:
            continue
        rows = rows_of(find_sources(names))
        with (
            tempfile.TemporaryDirectory(prefix="specbatch-") as folder,
            PartWriter(Path(folder), tokenizer_size(tokenizer)) as writer,
        ):
            first = islice(rows, FIRST_ROWS)
            for batch in convert_rows(config, tokenizer, first, FIRST_ROWS, prompts=title == "held-out", workers=0):
                writer.add(batch)
        part, more = writer.part, next(rows, None) is not None
        try:
            judge(config, title, part)
        except UserError as error:
            if not (more and (part.samples or part.prompts)):
                raise
            warnings.append(f"of the first {FIRST_ROWS} rows, {str(error).splitlines()[0].rstrip(':')}")
    return warnings

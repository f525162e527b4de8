"""Which token ids a tokenizer can produce, read from its files without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specbatch.errors import UserError


def tokenizer_ids(folder: Path) -> dict[int, str]:
    """Ids and tokens of a Hugging Face tokenizer, added ones included; empty where it has no ``tokenizer.json``.

    Raises:
        UserError: if the file can't be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary: Any = content["model"].get("vocab", {})
        if isinstance(vocabulary, dict):
            ids = {int(i): token for token, i in vocabulary.items()}
        else:
            # Unigram models list their pieces with scores.
            ids = {i: piece[0] for i, piece in enumerate(vocabulary)}
        ids.update((int(entry["id"]), entry["content"]) for entry in content.get("added_tokens") or [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a tokenizer file ({error}); download it again") from error
    return ids

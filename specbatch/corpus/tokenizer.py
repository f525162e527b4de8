"""The target's tokenizer: loading, size, and a fingerprint of everything that it consists of."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Any

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.rundir import read_json
from specbatch.target import locate

_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".vocab", ".py")
"""Suffixes of files that a tokenizer may be made from, remote code included."""


def load_tokenizer(config: Config) -> Any:
    """Load the target's tokenizer with transformers.

    Raises:
        UserError: it is missing or can't be read.
    """
    from transformers import AutoTokenizer

    folder, trusted = locate(config.target.path), config.target.trust_remote_code
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"target.path: the tokenizer in {folder} cannot be loaded: {error}") from error


def tokenizer_size(tokenizer: Any) -> int:
    """Return the number of ids, from 0 to the highest of the tokenizer."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(config: Config) -> str:
    """Return a hash of all files of the tokenizer and its chat template, and of the libraries that read them."""
    root, digest = locate(config.target.path), hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in _SUFFIXES and p.is_file()):
        if path.name.endswith(".index.json"):
            continue
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    libraries = [f"{name} {version(name)}" for name in ("transformers", "tokenizers", "jinja2")]
    digest.update(f"{config.target.trust_remote_code} {libraries}".encode())
    return digest.hexdigest()


def end_ids(config: Config) -> tuple[int, ...]:
    """Return the ids at which the target stops, by its generation settings."""
    value = (read_json(locate(config.target.path) / "generation_config.json") or {}).get("eos_token_id")
    return tuple(value) if isinstance(value, list) else () if value is None else (int(value),)

"""Docstrings begin with their subject: what a function returns or does, what a value is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
HEADLESS = re.compile(r'^\s*r?"""(Of|That|Told|Nobody|Whoever|As|Those|Who) ', re.MULTILINE)
"""Beginnings of sentences that lack their subject, or hide it."""
TRANSLATED = re.compile(r"^.*\b(?:for ever|anybody|has not got|all the same|want of)\b.*$", re.MULTILINE)
"""Lines with phrases that read translated."""


@pytest.mark.parametrize("folder", ["specbatch", "tools", "tests"])
def test_no_docstring_begins_without_its_subject(folder: str):
    found = [
        f"{path.relative_to(REPOSITORY)}: {match[0].strip()}"
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for match in HEADLESS.finditer(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize("folder", ["specbatch", "tools"])
def test_no_text_reads_translated(folder: str):
    found = [
        f"{path.relative_to(REPOSITORY)}: {match[0].strip()}"
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for match in TRANSLATED.finditer(path.read_text())
    ]
    assert found == []

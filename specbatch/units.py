"""Large numbers for people."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """Format bytes in binary units: ``1.50 GiB``, ``13.6 MiB``, ``12 bytes``."""
    for unit, shift in (("TiB", 40), ("GiB", 30)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.2f} {unit}"
    for unit, shift in (("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count:.0f} bytes"


def count_text(count: float) -> str:
    """Format a count in decimal units: ``1.50 B``, ``13.60 M``."""
    return f"{count / 1e9:,.2f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M"

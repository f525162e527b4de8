"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources

from specbatch.report.document import Document

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{charts_style}{style}</style>
</head>
<body>
<main id="page"><noscript>This report is drawn by its own program: allow JavaScript for this file.</noscript></main>
<script type="application/json" id="data">{data}</script>
<script>{charts}</script>
<script>{program}</script>
</body>
</html>
"""


def page(found: Document, live: str = "") -> str:
    """Return a document as HTML.

    Args:
        live: URL for newer data, relative to the page; empty if there is none.
    """
    charts, program = asset("uPlot.iife.min.js"), asset("report.js")
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in (charts, program))
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; " + (
        "connect-src 'self'" if live else "connect-src 'none'"
    )
    return PAGE.format(
        policy=policy,
        title=html.escape(", ".join(run["name"] for run in found["runs"][:3]) + " - specbatch report"),
        charts_style=asset("uPlot.min.css"),
        style=asset("report.css"),
        data=as_json({**found, "live": live}),
        charts=charts,
        program=program,
    )


def as_json(value: object) -> str:
    """Return JSON for a script element, such that no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def asset(name: str) -> str:
    """Return the text of a file that is shipped for the page."""
    return resources.files("specbatch.report").joinpath("assets", name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

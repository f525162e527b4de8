"""The page in a real browser without a window: Debian's chromium, which tools/test installs."""

from __future__ import annotations

import re
import subprocess
import threading

import pytest

from specbatch.report.document import document
from specbatch.report.live import LiveServer
from specbatch.report.page import page
from specbatch.report.reading import read_run
from tests.report.synthetic import ANSWER, DIFFERENCES, SWEEP, make_run


def show(url, profile, *arguments):
    """The document that the page makes of itself, and what its programs said."""
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=2000", *arguments,
            url,
        ],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.light
def test_the_page_draws_its_charts_without_an_error_and_texts_stay_texts(tmp_path):
    one = make_run(tmp_path / "one", 3000, every=100, config={"run": {"name": "<b>bold</b></script>"}}, wait=0.4)
    found = {"sweep": SWEEP, "differences": DIFFERENCES}
    two = make_run(tmp_path / "two", 300, terms=["slot 1", "slot 2", "slot 3"], evaluation=found)
    runs = [read_run(run.root) for run in (one, two)]
    file = tmp_path / "one run.html"
    file.write_text(page(document(runs[:1])))
    text, said = show(file.as_uri(), tmp_path / "profile", "--dump-dom", "--window-size=1280,900")
    assert said == []
    assert 'data-charts="11"' in text
    assert len(re.findall(r"<canvas", text)) == 11
    page_only = text[: text.index('<script type="application/json"')]
    assert "&lt;b&gt;bold&lt;/b&gt;&lt;/script&gt;" in page_only
    assert ANSWER["prompt"].replace("<", "&lt;").replace(">", "&gt;") in page_only
    assert "<img" not in page_only
    assert "<b>" not in page_only
    assert "Trainers waited for packs" in page_only

    looks = []
    with LiveServer(lambda: looks.append(1) or document(runs[1:])) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.fresh_s = 0.0
        text, said = show(server.url, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=25000")
        server.shutdown()
    assert said == []
    assert "looks for news every 10 s" in text
    assert len(looks) >= 2

    file.write_text(page(document(runs)))
    text, said = show(file.as_uri(), tmp_path / "profile", "--dump-dom", "--window-size=400,800")
    assert said == []
    assert 'data-charts="11"' in text
    assert "2 runs side by side" in text
    assert "Best throughput: no draft with 8 at once, 200 tokens/s, 1.00 × plain decoding" in text
    assert "2.31 (2.10 to 2.52)" in text
    assert "70 % (66 % to 74 %), 40 % (35 % to 45 %), 20 % (10 % to 30 %)" in text
    assert "&lt;b&gt;set&lt;/b&gt;" in text
    assert "<td>rounding</td>" in re.sub(r' class="number"', "", text)

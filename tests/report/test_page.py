"""The page as a file: what is in it, how large it is, and that no text of a run becomes a part of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from specbatch.cli import main
from specbatch.report.document import document
from specbatch.report.page import asset, page
from specbatch.report.reading import read_run
from tests.report.synthetic import make_run

NASTY = "</script><script>document.title = 'taken'</script><!-- & 'quotes' \" \u2028"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_whatever_texts_say_the_data_stay_one_block(tmp_path):
    run = make_run(tmp_path / "a", 40, config={"run": {"name": NASTY}})
    text = page(document([read_run(run.root)]))
    assert text.count("</script>") == 3
    assert "taken" not in re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S).replace(
        "&#x27;taken&#x27;", ""
    )
    assert data_of(text)["runs"][0]["name"] == NASTY
    assert "</script>" in data_of(text)["runs"][0]["answers"][0]["prompt"]


def test_only_the_two_programs_of_the_page_may_run(tmp_path):
    text = page(document([read_run(make_run(tmp_path / "a", 40).root)]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    programs = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in programs]
    assert f"script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}';" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert not re.search(r'(src|href)="?http', text)


def test_the_library_is_shipped_with_its_licence():
    assert "MIT License" in asset("uPlot.LICENSE")
    assert "Copyright" in asset("uPlot.LICENSE")
    assert "uPlot (v1.6.32)" in asset("uPlot.iife.min.js")[:400]


def test_the_document_tells_what_the_run_is(tmp_path):
    run = data_of(page(document([read_run(make_run(tmp_path / "a", 200).root)])))["runs"][0]
    assert run["measured"]["speed_up"] == pytest.approx(1.9)
    assert run["evaluations"]["best"] == 200
    assert (run["curves"]["size"], len(run["curves"]["step"])) == (1, 200)
    assert run["curves"]["tokens"][-1] == run["tokens"] == 400_000
    assert set(run["curves"]["mean"]) == {
        "loss", "loss/0", "loss/1", "loss/2", "accuracy/0", "accuracy/1", "accuracy/2", "learning_rate", "grad_norm",
        "tokens_per_s", "waited", "store", "idle",
    }  # fmt: skip
    assert dict(run["facts"])["Target"] == "Tiny-8B-Instruct"
    assert run["plan"]["planned"] is None
    assert "another version" in run["plan"]["why"]
    assert [each["kind"] for each in run["reference_curves"]] == ["this", "project", "project"]


def test_a_long_run_is_a_small_page_that_keeps_extremes(tmp_path):
    spike = {7_777: {"grad_norm": 123.0}}
    found = document([read_run(make_run(tmp_path / "a", 12_000, every=1000, lines=spike, attempts=3).root)])
    curves = found["runs"][0]["curves"]
    assert curves["size"] == 12
    assert len(curves["step"]) == 1000
    assert max(curves["greatest"]["grad_norm"]) == 123
    assert max(curves["mean"]["grad_norm"]) < 15
    assert len(page(found)) < 600_000


def test_settings_that_differ_are_told_and_no_others(tmp_path):
    runs = [
        make_run(tmp_path / name, 40, config={"training": {"learning_rate": rate}})
        for name, rate in (("a", 1), ("b", 2))
    ]
    found = document([read_run(run.root) for run in runs])
    assert all(run["marks"] == run["reference_curves"] == [] for run in found["runs"])
    assert found["differences"] == [["training.learning_rate", "1", "2"]]


def test_a_run_that_has_trained_nothing_yet_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("run:\n  dir: x\n")
    assert data_of(page(document([read_run(tmp_path)])))["runs"][0]["curves"]["step"] == []


def test_the_command_writes_the_page_and_says_what_is_off(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a", 100, wait=0.4)
    make_run(tmp_path / "runs" / "b", 100, reach=0.7)
    assert main(["report", "runs/a"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("a: Trainers waited for packs 40% of the time")
    assert re.fullmatch(r"runs/a/report.html: 0\.\d\d MB, opens in any browser", told[-1])
    found = data_of((tmp_path / "runs" / "a" / "report.html").read_text())
    # The user's other run with this target is its measure.
    assert [each["name"] for each in found["runs"][0]["reference_curves"] if each["kind"] == "own"] == ["b"]
    assert main(["report", "runs/a", "runs/b", "--output", "both.html"]) == 0
    assert len(data_of((tmp_path / "both.html").read_text())["runs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none: is not a run directory"),
        (["run", "--port", "80"], "--port: belongs to --live"),
        (["run", "--live", "--output", "x"], "--output: --live writes no file"),
        (["run", "--output", "run/config.yaml/x.html"], "config.yaml/x.html: can't be written"),
    ],
)
def test_what_can_not_be_done_is_refused(arguments, message, tmp_path, capsys):
    make_run(tmp_path / "run", 20)
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err

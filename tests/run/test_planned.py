"""A whole run that starts from another draft and is evaluated on the way; and what `specbatch plan` says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from specbatch.export import export
from specbatch.rundir import RunDir
from tests.run.test_local import Run, new_run
from tests.test_export import make_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS, EVERY = 48, 16
BENCH = Path(__file__).parents[2] / "tools" / "bench" / "plan.py"


@pytest.fixture(scope="module")
def started_from_a_draft(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Run:
    folder = tmp_path_factory.mktemp("planned")
    draft = export(make_run(folder / "before", tiny_target, vocab=64, intermediate=128))
    run = new_run(folder / "run", tiny_target)
    text = run.config.read_text().replace("ttt_steps: 3,", f"ttt_steps: 3, init_from: {json.dumps(str(draft))},")
    text = text.replace(
        "epochs: 8, max_steps: 8,", f"epochs: 50, max_steps: {STEPS}, evaluate_interval_steps: {EVERY},"
    )
    run.config.write_text(text.replace("interval: 3}", f"interval: {EVERY}}}"))
    done = run.run()
    assert done.returncode == 0, done.stdout + done.stderr
    run.output = done.stdout  # type: ignore[attr-defined]
    return run


def test_evaluations_are_told_while_the_run_goes_on(started_from_a_draft):
    run = started_from_a_draft
    found = {row["step"]: row["evaluation"] for row in run.metrics() if "evaluation" in row}
    assert list(found) == list(range(EVERY, STEPS + 1, EVERY))
    assert found[STEPS]["loss"] < found[EVERY]["loss"]
    for step, evaluation in found.items():
        assert f"held-out data after step {step}: loss {evaluation['loss']:.3f}" in run.output
        assert (evaluation["packs"], 1 <= evaluation["acceptance_length"] <= 4) == (2, True)


def test_the_best_snapshot_can_be_exported(started_from_a_draft, tmp_path):
    command = started_from_a_draft.command(
        "export", str(started_from_a_draft.root), "--best", "--out", str(tmp_path / "best")
    )
    subprocess.run(command, check=True, timeout=100)
    evaluations = {row["step"]: row["evaluation"] for row in started_from_a_draft.metrics() if "evaluation" in row}
    best = max(evaluations, key=lambda step: (evaluations[step]["acceptance_length"], -evaluations[step]["loss"]))
    assert json.loads((tmp_path / "best" / "specbatch.json").read_text())["step"] == best


def test_the_plan_of_a_run_is_what_it_took(started_from_a_draft):
    """Within a quarter: from the rates of either side while it had work, and from who waits for whom. The first step is
    left out, as it is in the rates: of a run this short it would be half."""
    run = started_from_a_draft
    command = run.command("plan", "--config", str(run.config), "--like", str(run.root), "--json")
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout)
    rows, work, times = run.metrics(), planned["work"], planned["times"]
    assert (work["steps"], work["tokens"]) == (STEPS, sum(row["tokens"] for row in rows))
    assert (work["heldout_packs"], planned["layout"]["evaluations"]) == (2, 3)
    events = RunDir(run.root).events(1).read_text().splitlines()
    stored = {tuple(e["pack"]): e["bytes"] for e in map(json.loads, events) if e["event"] == "stored"}
    assert stored.pop((-1, 0)) + stored.pop((-1, 1)) == work["heldout_bytes"]
    assert sum(stored.values()) == work["bytes"]
    done = subprocess.run([sys.executable, str(BENCH), str(run.root)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["steps"], found["tokens"]) == (STEPS, work["tokens"])
    assert found["planned_s"] == pytest.approx(times["total_s"] - times["fill_s"])
    assert found["ratio"] == pytest.approx(1, rel=0.25)
    short = subprocess.run(
        [sys.executable, str(BENCH), str(run.root), "--within", "0"], capture_output=True, timeout=100
    )
    assert short.returncode == 1, "a plan that is further off is told by the exit code"


def test_a_plan_says_what_to_do_about_a_mistake_and_writes_no_run(started_from_a_draft, tmp_path):
    run = started_from_a_draft
    command = [
        sys.executable,
        "-m",
        "specbatch",
        "plan",
        "--config",
        str(run.config),
        "--run.dir",
        str(tmp_path / "new"),
    ]
    done = subprocess.run(
        [*command, "--draft.init_from", "/none"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"specbatch: {run.config}: draft.init_from: there is no directory /none")
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert "assumed: 40% of the 989 TFLOP/s (bfloat16) of an H100" in done.stdout
    assert not (tmp_path / "new").exists()

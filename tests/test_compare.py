"""Runs as their directories tell of them: made here, with real snapshots."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from specbatch.cli import main
from specbatch.compare import compare, report
from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.snapshot.storage import HDF5Writer


def line(step, **changes):
    return {
        "step": step, "loss": 5.0 / step, "losses": [3.0, None], "accuracy": [0.1 * step, None], "grad_norm": 0.5,
        "learning_rate": 1e-3, "tokens": 100 + step, "loss_tokens": 50, "void_packs": 0, "seconds": 1.0, **changes,
    }  # fmt: skip


def make_run(root, *, lines=None, shift=0.0, step=4, export=True, position=4):
    run = RunDir(root)
    root.mkdir()
    run.config.write_text("")
    lines = [line(step) for step in range(1, 5)] if lines is None else lines
    run.metrics.write_text("".join(json.dumps(one) + "\n" for one in lines))
    generator = torch.Generator().manual_seed(0)
    state = {
        "fc.weight": torch.randn(8, 4, generator=generator) + shift,
        "draft_ids": torch.arange(5),
        "optimizer": {"state.fc.weight.exp_avg": torch.randn(8, 4, generator=generator).to(torch.bfloat16)},
        "random": {"rank-0": {"cpu": torch.arange(10, dtype=torch.uint8)}},
        "train_state": {"step": position},
    }
    dcp.save(state, storage_writer=HDF5Writer(run.snapshots / f"step-{step}", step=step), no_dist=True)
    if export:
        run.export.mkdir()
        (run.export / "config.json").write_text("{}")
        save_file({"fc.weight": state["fc.weight"].to(torch.bfloat16)}, run.export / "model.safetensors")
    return run


def far(found, name):
    return next(distance for distance in found.distances if distance.name == name)


def test_equal_runs_are_equal_whatever_their_clocks_said(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", lines=[line(step, seconds=9.0) for step in range(1, 5)])
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal, bit for bit"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"]
    assert {distance["name"] for distance in told["distances"]} == {
        "loss", "losses", "accuracy", "grad_norm", "learning_rate", "weights", "optimizer", "random generators",
        "export",
    }  # fmt: skip


def test_the_first_step_that_differs_is_named_and_how_far(tmp_path):
    a = make_run(tmp_path / "a")
    changed = [line(1), line(2), line(3, loss=2.0), line(4, loss=1.25 + 2**-40)]
    found = compare(a, make_run(tmp_path / "b", lines=changed))
    assert not found.equal
    assert not found.is_noise
    assert found.first_step == 3
    loss = far(found, "loss")
    assert (loss.first, loss.largest) == ("step 3", pytest.approx(1 / 3))
    assert far(found, "grad_norm").equal
    assert [step["step"] for step in found.apart] == [3, 4]
    assert any("step 3: loss 1.6666666666666667 and 2.0" in words for words in report(found))


def test_weights_and_exports_are_compared_to_the_last_bit(tmp_path):
    found = compare(make_run(tmp_path / "a"), make_run(tmp_path / "b", shift=2**-20))
    weights = far(found, "weights")
    assert (weights.equal, weights.first) == (False, "fc.weight")
    assert 0 < weights.largest <= 2**-19
    assert far(found, "optimizer").equal
    assert far(found, "random generators").equal


def test_zero_and_minus_zero_are_not_the_same_bits(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for run, zero in ((a, 0.0), (b, -0.0)):
        save_file({"fc.weight": torch.full((2,), zero)}, run.export / "model.safetensors")
    assert not far(compare(a, b), "export").equal


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lines": [line(1), line(2), line(2), line(3), line(4)]}, "has step 2 2 times"),
        ({"lines": [line(1), line(3), line(2), line(4)]}, "not in the order of steps"),
        ({"lines": [line(1), line(2), line(4)]}, "lacks 1 steps, the first of them 3"),
        ({"lines": [line(1), line(2, tokens=7), line(3), line(4)]}, "tokens of step 2 is 102 and 7"),
        ({"position": 3}, "snapshot: train_state.step was 4 and is 3"),
        ({"step": 3}, "the runs have no snapshot of the same step"),
        ({"export": False}, "has an export"),
    ],
)
def test_what_can_not_be_noise_is_a_problem(tmp_path, changes, problem):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", **changes)
    found = compare(a, b, noise=(a, make_run(tmp_path / "c", shift=1.0)))
    assert any(problem in words for words in found.problems), found.problems
    assert not found.is_noise


def test_noise_is_what_two_undisturbed_runs_differ_by(tmp_path, capsys):
    def noisy(name, by):
        return str(make_run(tmp_path / name, lines=[line(step, loss=5.0 / step + by) for step in range(1, 5)]).root)

    a, near, far_off, c, d = noisy("a", 0.0), noisy("b", 1.5e-6), noisy("e", 2.5e-6), noisy("c", 0.0), noisy("d", 1e-6)
    assert main(["compare", a, near, "--noise", c, d]) == 0
    assert "within the noise" in capsys.readouterr().out
    assert main(["compare", a, far_off, "--noise", c, d]) == 1
    assert "beyond the noise of two undisturbed runs: loss" in capsys.readouterr().out
    assert main(["compare", a, near]) == 1


def test_a_run_without_metrics_is_the_users_mistake(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    b.metrics.unlink()
    with pytest.raises(UserError, match="no step was trained"):
        compare(a, b)

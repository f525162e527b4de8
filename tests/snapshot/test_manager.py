"""The manager with torchtitan's own optimizer and schedule, on one rank in this process and on two of their own."""

import logging
import os
import resource
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from specbatch.errors import RunError, UserError
from specbatch.snapshot.manifest import MANIFEST, whole_snapshots
from specbatch.snapshot.reading import read_tensors
from tests.snapshot.ranks import on_ranks

pytestmark = pytest.mark.light
FACTS = {"plan": {"seed": 0}, "draft": {"hidden": 8}}


class Position:
    """A dataloader's and a trainer's part of the state."""

    def __init__(self):
        self.step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class Training:
    """A model of two matrices, trained on noise from torch's random generator."""

    def __init__(self, folder, mesh=None, width=3, **config):
        from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

        from specbatch.snapshot.manager import HDF5CheckpointManager

        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 33), torch.nn.Linear(33, width))
        if mesh is not None:
            fully_shard(self.model, mesh=mesh)
        groups = [ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2})]
        optimizers = OptimizersContainer.Config(param_groups=groups, implementation="foreach")
        self.optimizers = optimizers.build(model_parts=[self.model])
        schedule = LRSchedulersContainer.Config(warmup_steps=2)
        self.schedule = schedule.build(optimizers=self.optimizers, training_steps=20)
        self.position = Position()
        config = {"interval": 2, "facts": FACTS, **config}
        self.manager = HDF5CheckpointManager.Config(enable=True, **config).build(
            dataloader=Position(),
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedule,
            states={"train_state": self.position},
            sd_adapter=None,
            base_folder=str(folder),
        )

    def steps(self, until, last=False):
        """Train to a step; each step's loss."""
        losses = []
        while self.position.step < until:
            loss = self.model(torch.randn(4, 8)).square().mean()
            loss.backward()
            self.optimizers.step()
            self.schedule.step()
            self.optimizers.zero_grad()
            self.position.step += 1
            losses.append(loss.item())
            self.manager.save(self.position.step, last_step=last and self.position.step == until)
        return losses

    def weights(self):
        full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in self.model.state_dict().items()}
        return {name: tensor.clone() for name, tensor in full.items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def resumed(folder, **config):
    training = Training(folder, **config)
    assert training.manager.load()
    return training


def test_a_resumed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    undisturbed = Training(tmp_path / "a")
    losses = undisturbed.steps(8)
    killed = Training(tmp_path / "b")
    assert killed.steps(5) == losses[:5]
    killed.manager.close()
    again = resumed(tmp_path / "b")
    assert again.position.step == again.manager.saved_step == 4
    assert again.steps(8) == losses[4:]
    assert equal(again.weights(), undisturbed.weights())
    assert again.optimizers.state_dict().keys() == undisturbed.optimizers.state_dict().keys()
    for name, value in undisturbed.optimizers.state_dict().items():
        other = again.optimizers.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_without_a_snapshot_training_begins_anew(tmp_path):
    training = Training(tmp_path)
    assert not training.manager.load()
    assert training.manager.saved_step is None


def test_the_last_whole_ones_are_kept(tmp_path):
    training = Training(tmp_path, keep=3)
    training.steps(11)
    training.manager.close()
    assert whole_snapshots(tmp_path / "snapshots") == [6, 8, 10]


def test_the_last_save_is_whole_on_return_and_not_made_twice(tmp_path, caplog):
    caplog.set_level(logging.INFO, "specbatch")
    training = Training(tmp_path)
    training.steps(5)
    assert training.manager.save(5, last_step=True)
    assert whole_snapshots(tmp_path / "snapshots") == [4, 5]
    training.steps(6)
    assert not training.manager.save(6, last_step=True)
    assert whole_snapshots(tmp_path / "snapshots") == [5, 6]
    assert not training.manager.save(6, last_step=True)
    assert not resumed(tmp_path).manager.save(6, last_step=True)
    assert sum("snapshot written step=6 " in line for line in caplog.messages) == 1


def test_a_snapshot_holds_published_names_and_the_whole_state(tmp_path):
    training = Training(tmp_path, async_mode="disabled")
    training.steps(2)
    stored = read_tensors(tmp_path / "snapshots" / "step-2")
    assert equal(training.weights(), stored)
    assert {"optimizer.state.0.weight.exp_avg", "random.rank-0.cpu"} <= set(stored)


def test_a_damaged_snapshot_is_refused_by_name_and_the_one_before_taken(tmp_path, caplog):
    training = Training(tmp_path)
    losses = training.steps(5)
    training.manager.close()
    damaged = tmp_path / "snapshots" / "step-4" / "rank-0.h5"
    weights = training.manager.states["model"].state_dict()["1.weight"]
    stored = read_tensors(damaged.parent, names=["1.weight"])["1.weight"]
    assert stored.shape == weights.shape
    data = damaged.read_bytes()
    at = data.index(stored.numpy().tobytes())
    damaged.write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
    again = resumed(tmp_path)
    assert "step-4/rank-0.h5: tensor 1.weight is not what was written" in caplog.text
    assert again.position.step == 2
    assert again.steps(5) == losses[2:]
    again.manager.close()
    assert whole_snapshots(tmp_path / "snapshots") == [2, 4]
    assert sorted(os.listdir(tmp_path / "snapshots")) == ["step-2", "step-4"]


def test_when_no_snapshot_can_be_read_the_run_does_not_quietly_begin_anew(tmp_path):
    training = Training(tmp_path)
    training.steps(5)
    training.manager.close()
    for step in (2, 4):
        file = tmp_path / "snapshots" / f"step-{step}" / "rank-0.h5"
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"none of the snapshots in .* can be read \(steps 2, 4"):
        Training(tmp_path).manager.load()


def test_what_a_killed_save_left_is_deleted(tmp_path):
    training = Training(tmp_path)
    training.steps(5)
    training.manager.close()
    (tmp_path / "snapshots" / "step-4" / MANIFEST).unlink()
    assert resumed(tmp_path).position.step == 2
    assert os.listdir(tmp_path / "snapshots") == ["step-2"]


def test_another_plan_is_refused_and_what_differs_is_named(tmp_path):
    Training(tmp_path).steps(2, last=True)
    other = {"plan": {"seed": 1}, "draft": {"hidden": 8}}
    with pytest.raises(UserError, match=r"plan\.seed was 0 and is 1\. Restore"):
        Training(tmp_path, facts=other).manager.load()


def test_another_model_is_refused(tmp_path):
    Training(tmp_path).steps(2, last=True)
    with pytest.raises(UserError, match=r"does not fit this draft model: .*Size mismatch .*1\.bias"):
        Training(tmp_path, width=4).manager.load()


@pytest.mark.parametrize("config", [{"keep": 0}, {"keep_latest_k": 2}, {"last_save_model_only": True}])
def test_settings_that_lose_snapshots_are_refused(tmp_path, config):
    with pytest.raises(ValueError, match="keep"):
        Training(tmp_path, **config)


def limit(size=None):
    """Let no file of this process grow longer: what a full disk looks like to one process."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def full_on_one_rank(rank, folder, mode):
    training = Training(folder, init_device_mesh("cpu", (2,)), async_mode=mode)
    told = []
    training.manager.tell = lambda what, why: told.append((what, why))
    training.steps(3)
    training.manager.maybe_wait_for_saving()
    limit(6000 if rank == 1 else None)
    training.steps(7)
    training.manager.maybe_wait_for_saving()
    assert training.manager.saved_step == 2
    with pytest.raises(RunError, match="the last snapshot, of step 7, could not be written"):
        training.manager.save(7, last_step=True)
    assert whole_snapshots(folder / "snapshots") == [2]
    assert [what for what, why in told if "step 4: OSError: [Errno 27] File too large" in why] == ["snapshot"] * (
        not rank
    )
    training.manager.make_room = limit
    training.manager.save(7, last_step=True)
    training.steps(9, last=True)
    training.manager.close()
    assert told[-1:] == [("snapshot", "")] * (not rank)
    again = Training(folder, init_device_mesh("cpu", (2,)), async_mode=mode)
    assert again.manager.load()
    assert (again.position.step, again.manager.saved_step) == (9, 9)
    assert equal(again.weights(), training.weights())
    again.manager.close()
    torch.save(training.weights(), folder / f"weights-{rank}")


def two_ranks(rank, folder):
    for mode in ("async", "disabled"):
        full_on_one_rank(rank, folder / mode, mode)
    training = Training(folder / "one", init_device_mesh("cpu", (2,)))
    assert training.manager.load()
    assert equal(training.weights(), torch.load(folder / "one" / "weights"))
    training.manager.close()


@pytest.mark.timeout(600)
def test_a_full_disk_of_one_rank_stops_nobody_and_snapshots_fit_other_numbers_of_ranks(tmp_path):
    for name in ("async", "disabled", "one"):
        (tmp_path / name).mkdir()
    training = Training(tmp_path / "one")
    training.steps(3, last=True)
    torch.save(training.weights(), tmp_path / "one" / "weights")
    on_ranks(2, two_ranks, tmp_path)
    for mode in ("async", "disabled"):
        assert sorted(os.listdir(tmp_path / mode / "snapshots")) == ["step-8", "step-9"]
        training = resumed(tmp_path / mode)
        assert training.position.step == 9
        assert equal(training.weights(), torch.load(tmp_path / mode / "weights-0"))


def test_training_goes_on_while_a_snapshot_is_written(tmp_path):
    training = Training(tmp_path)
    training.steps(2)
    before = training.weights()
    began = time.monotonic()
    training.steps(3)
    assert not equal(before, training.weights())
    training.manager.maybe_wait_for_saving()
    assert equal(before, read_tensors(tmp_path / "snapshots" / "step-2"))
    assert time.monotonic() - began < 60

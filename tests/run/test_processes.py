"""Components of a local run share the GPUs that the user has chosen for it, and no others."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from specbatch.config import Config
from specbatch.config.sections import Data, Inference, Run, Target, Training
from specbatch.run.processes import _submit, shared_gpus


def config() -> Config:
    return Config(
        run=Run(dir="run"),
        target=Target(path="target"),
        data=Data(train=["a.jsonl"]),
        training=Training(ranks=2),
        inference=Inference(engines=2, tensor_parallel=2),
    )


@pytest.mark.parametrize(
    ("names", "engines", "ranks"),
    [
        (None, [["0", "1"], ["2", "3"]], ["4", "5"]),
        (["2", "3", "4", "5", "6", "7"], [["2", "3"], ["4", "5"]], ["6", "7"]),
        (["GPU-a", "GPU-b", "GPU-c", "GPU-d", "GPU-e", "GPU-f"], [["GPU-a", "GPU-b"], ["GPU-c", "GPU-d"]],
         ["GPU-e", "GPU-f"]),
        ([], [[], []], []),
    ],
)  # fmt: skip
def test_gpus_are_shared_out_of_the_users_list(names, engines, ranks):
    assert shared_gpus(config(), 2, names) == (engines, ranks)
    assert shared_gpus(config(), 0, names) == ([], names[:2] if names is not None else ["0", "1"])


def write_gpus(path: Path) -> None:
    path.write_text(os.environ["CUDA_VISIBLE_DEVICES"])


def test_a_component_sees_its_own_gpus_whatever_they_are_called(tmp_path: Path):
    job = _submit(tmp_path, ["GPU-a", "7"], write_gpus, tmp_path / "seen")
    until = time.monotonic() + 60
    while not job.done() and time.monotonic() < until:
        time.sleep(0.1)
    assert (tmp_path / "seen").read_text() == "GPU-a,7"

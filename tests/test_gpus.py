"""Each task of a node gets its own GPUs, in each of the ways in which sites give them, or a reason why not."""

from __future__ import annotations

import os

import pytest

from specbatch.errors import UserError
from specbatch.gpus import count_accelerators, gpu_share, listed_gpus, take_gpus


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1, 2"}, ["0", "1", "2"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5ba0,GPU-71cd"}, ["GPU-5ba0", "GPU-71cd"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"ROCR_VISIBLE_DEVICES": "4,5"}, ["0", "1"]),
    ],
)
def test_what_the_environment_lists(environment, names):
    assert listed_gpus(environment) == names


@pytest.mark.parametrize(
    ("names", "need", "local", "there", "mine"),
    [
        (None, 1, 2, 4, ["2"]),  # whole nodes, no variable: Alps, Lonestar6
        (None, 2, 1, 4, ["2", "3"]),
        (["0", "1", "2", "3"], 1, 1, 0, ["1"]),  # all of the node for each task: Perlmutter, JUWELS
        (["4", "5", "6", "7"], 2, 1, 0, ["6", "7"]),
        (["3"], 1, 3, 0, ["3"]),  # one a task: --gpus-per-task
        (["GPU-b", "GPU-c"], 2, 1, 0, ["GPU-b", "GPU-c"]),
        (["0", "1", "2", "3"], 3, 0, 0, ["0", "1", "2"]),
    ],
)
def test_each_task_of_a_node_has_its_own_gpus(names, need, local, there, mine):
    assert gpu_share(names, need, local, there) == mine


@pytest.mark.parametrize(
    ("names", "need", "local", "there", "words"),
    [
        (None, 1, 0, 0, "task 0 of the node needs 1 GPUs, but CUDA_VISIBLE_DEVICES is not set and the node has 0"),
        (None, 2, 2, 4, "needs 2 GPUs, but CUDA_VISIBLE_DEVICES is not set and the node has 4"),
        (["0"], 2, 0, 0, "needs 2 GPUs, but CUDA_VISIBLE_DEVICES lists 0; ask for 2 GPUs a task"),
        ([], 1, 0, 0, "lists none"),
        (["0", "1"], 1, 2, 0, "task 2 of the node needs 1 GPUs, but CUDA_VISIBLE_DEVICES lists 0,1"),
    ],
)
def test_too_few_gpus_are_an_error_that_names_node_list_and_need(names, need, local, there, words):
    with pytest.raises(UserError, match=words) as error:
        gpu_share(names, need, local, there)
    assert str(error.value).startswith(os.uname().nodename)


@pytest.mark.skipif(count_accelerators()[0] > 0, reason="the GPUs of this machine can be used")
def test_gpus_that_torch_cannot_use_are_an_error_and_no_engine_on_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=r"was given the GPUs 1 and needs 1, but torch can use 0 .*nvidia-smi"):
        take_gpus(1, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    take_gpus(0, 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1", "who asked for none is left alone"

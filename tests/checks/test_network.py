"""A store over TCP between nodes with GPUs, against what their engines give."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from specbatch.checks.network import warn_of_tcp
from specbatch.config import Config, Data, Inference, Run, Store, Target
from specbatch.config.sections import Slurm, SlurmComponent
from specbatch.drafts.eagle3.contract import Eagle3Contract

TENSORS = {"model.layers.0.mlp.up_proj.weight": SimpleNamespace(shape=(7_000_000_000, 1), dtype="BF16")}
TARGET: Any = SimpleNamespace(weights=SimpleNamespace(tensors=TENSORS), path="", layers=32, experts=None)
CONTRACT = Eagle3Contract((1, 17, 32), 4096)


def config(engines: int, gpus: int = 8, protocol: Any = "tcp") -> Config:
    slurm = Slurm(inference=SlurmComponent(gpus_per_node=gpus), training=SlurmComponent(gpus_per_node=gpus))
    result = Config(
        Run(dir="r"), Target(path="t"), Data(train=["d"]), inference=Inference(engines=engines), slurm=slurm
    )
    return replace(result, store=Store(protocol=protocol, devices="mlx5_0"))


def test_many_gpus_over_tcp_are_warned_of_with_both_numbers() -> None:
    (warning,) = warn_of_tcp(config(8), TARGET, CONTRACT, here=False)
    assert "inference.engines: 8 of about 28k tokens/s" in warning
    assert "produce 7.4 GB of hidden states per second, but TCP carries about 3.0 GB/s" in warning
    assert not warn_of_tcp(config(2), TARGET, CONTRACT, here=False)
    assert not warn_of_tcp(config(8, protocol="rdma"), TARGET, CONTRACT, here=False)
    assert not warn_of_tcp(config(8, gpus=0), TARGET, CONTRACT, here=False)
    assert not warn_of_tcp(config(8), TARGET, CONTRACT, here=True)

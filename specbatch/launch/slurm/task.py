"""What one task of a component's step does: the function that submitit's pickles hold."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specbatch.config import load_config
from specbatch.errors import RunError
from specbatch.rundir import RunDir
from specbatch.training.place import Place

Name = Literal["head", "inference", "training"]


@dataclass(frozen=True)
class Component:
    """A component of the run in ``root``, whichever attempt it is."""

    name: Name
    root: Path

    def __call__(self) -> None:
        """Do this task's work; the script and Slurm say in the environment which task of which attempt it is.

        Raises:
            RunError: it failed; its log says why.
        """
        from specbatch.launch import components
        from specbatch.launch.address import node_address

        attempt, starts = int(os.environ["SPECBATCH_ATTEMPT"]), int(os.environ.get("SPECBATCH_STARTS", "0"))
        task, config = int(os.environ["SLURM_PROCID"]), load_config(RunDir(self.root).config)
        slurm = config.slurm
        try:
            address = node_address(slurm.interface)
            if self.name == "head":
                components.head(self.root, attempt, starts, address, slurm.training.nodes)
            elif self.name == "inference":
                _take_gpus(config.inference.tensor_parallel)
                components.inference(self.root, attempt, task, starts)
            else:
                components.training(self.root, attempt, starts, Place(task, slurm.training.nodes, address))
        except SystemExit as error:
            # submitit keeps what an exception says, and nothing of an exit.
            raise RunError(f"{self.name} {task} of attempt {attempt} failed; its log says why") from error


def _take_gpus(each: int) -> None:
    """Engines of one node share its GPUs: each takes its own."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    local = int(os.environ["SLURM_LOCALID"])
    if seen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen.split(",")[local * each : (local + 1) * each])

"""The work of one task of a component's step: the function in submitit's pickles."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specbatch.config import load_config
from specbatch.config.engine_nodes import gpus_of_engine, nodes_per_engine
from specbatch.errors import RunError, UserError
from specbatch.free_ports import use_ports
from specbatch.gpus import take_gpus
from specbatch.inference.place import EnginePart
from specbatch.inference.staging import use_stage
from specbatch.run.address import name_interface, node_address
from specbatch.run.attempts import read_attempt
from specbatch.run.exit_records import ExitRecord, write_exit_record
from specbatch.rundir import RunDir
from specbatch.training.process.node import TrainingNode

Name = Literal["head", "inference", "training"]


@dataclass(frozen=True)
class ComponentTask:
    """A component of the run in ``root``, in any attempt."""

    name: Name
    root: Path

    def __call__(self) -> None:
        """Do this task's work; the script and Slurm's environment say which task of which attempt it is.

        Raises:
            RunError: it failed; its log says why.
        """
        attempt, starts = int(os.environ["SPECBATCH_ATTEMPT"]), int(os.environ.get("SPECBATCH_STARTS", "0"))
        task, run_dir = int(os.environ["SLURM_PROCID"]), RunDir(self.root)
        try:
            self._work(run_dir, attempt, task, starts)
        except UserError as error:
            # Every attempt would fail in the same way.
            node, why = socket.gethostname(), str(error)
            why = why if node in why else f"{why} (on {node})"
            write_exit_record(run_dir, attempt, ExitRecord(self.name, task, why))
            raise RunError(f"{self.name} {task} of attempt {attempt}: {why}") from error
        except SystemExit as error:
            # submitit reports exceptions, but not exits.
            raise RunError(f"{self.name} {task} of attempt {attempt} failed; its log says why") from error

    def _work(self, run_dir: RunDir, attempt: int, task: int, starts: int) -> None:
        from specbatch.checks.target import check_readable
        from specbatch.run import components

        config = load_config(run_dir.config)
        slurm, nodes = config.slurm, nodes_per_engine(config)
        use_ports(slurm.ports)
        began = read_attempt(run_dir, attempt)
        address = node_address(slurm.interface, {node for of in began.nodes.values() for node in of} if began else ())
        name_interface(address)
        check_readable(config)
        local = int(os.environ.get("SLURM_LOCALID", "0"))
        if self.name == "head":
            components.head(self.root, attempt, starts, address, slurm.training.nodes, nodes)
        elif self.name == "inference":
            take_gpus(gpus_of_engine(config) if slurm.inference.gpus_per_node else 0, local)
            use_stage(slurm.stage_target)
            components.inference(self.root, attempt, task, starts, EnginePart(nodes, task % nodes, address))
        else:
            take_gpus(config.training.ranks // slurm.training.nodes if slurm.training.gpus_per_node else 0, local)
            components.training(self.root, attempt, starts, TrainingNode(task, slurm.training.nodes, address))

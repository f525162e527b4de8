"""The doctor on this machine: the tasks of all components as local processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from specbatch.config import Config
from specbatch.doctor.task import ENGINES_ENDED
from specbatch.gpus import CUDA, listed_gpus
from specbatch.run.processes import shared_gpus


def examine_here(config: Config, root: Path) -> None:
    """Run all tasks until they end; their findings are in the directory.

    Args:
        config: configuration of the trial, as in ``config.yaml`` there.
    """
    of_engines, of_ranks = shared_gpus(config, config.inference.engines, listed_gpus())
    log = root / "doctor.log"
    with log.open("ab") as output:

        def start(component: str, task: int, gpus: list[str]) -> subprocess.Popen[bytes]:
            argv = [sys.executable, "-m", "specbatch.doctor.task", component, "--here", f"--task={task}"]
            environment = {**os.environ, CUDA: ",".join(gpus)}
            return subprocess.Popen(
                argv, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

        started = [start("head", 0, []), start("training", 0, of_ranks)]
        engines = [start("inference", task, gpus) for task, gpus in enumerate(of_engines)]
        try:
            for process in engines:
                process.wait()
            (root / ENGINES_ENDED).touch()
            for process in started:
                process.wait()
        finally:
            for process in (*engines, *started):
                process.terminate()

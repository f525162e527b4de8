"""submitit's executor for a job of several components: one folder and one pickle a component, one script for all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from submitit.core.utils import DelayedSubmission
from submitit.slurm import slurm

from specbatch.config import Config
from specbatch.launch.slurm import commands
from specbatch.launch.slurm.jobs import record_job
from specbatch.launch.slurm.script import SCRIPT, parts_of, render, size
from specbatch.launch.slurm.task import Component
from specbatch.rundir import RunDir, write_whole

PICKLE = "component.pkl"
"""A component's function, in its folder, for whichever job it will be: submitit looks for a copy named by the job."""
WHENEVER_MIN = 1 << 30
"""submitit would requeue a job that reached its time limit by itself; the run has its own ways."""


class ComponentsWatcher(slurm.SlurmInfoWatcher):
    """Knows that a heterogeneous job's rows are ``123+0``, ``123+1``: the first component's state is the job's."""

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Of each job what submitit wants to know."""
        text = string if isinstance(string, str) else string.decode()
        found = super().read_info(re.sub(r"^(\d+)\+0\|", r"\1|", text, flags=re.M))
        return {job: row | {"State": row["State"].split(" ")[0]} for job, row in found.items()}


class ComponentsJob(slurm.SlurmJob[None]):
    """One component of a job."""

    watcher = ComponentsWatcher(delay_s=600)


class ComponentsExecutor(slurm.SlurmExecutor):
    """Submits all components of a run as one job.

    Args:
        run_dir: written: ``job.sbatch`` and ``submitit/<component>/``.
    """

    job_class = ComponentsJob

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        super().__init__(run_dir.root / "submitit")
        self._run_dir, self._config = run_dir, config

    @classmethod
    def name(cls) -> str:
        """What submitit's part inside the job knows it by."""
        return "slurm"

    def write(self) -> Path:
        """Write all that ``sbatch job.sbatch`` needs, and return the script.

        Raises:
            UserError: the run directory's name can't be written into a script.
        """
        script = self._make_submission_file_text("", "")
        for part in parts_of(self._config):
            folder = Path(self.folder) / part.name
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            submission = DelayedSubmission(Component(part.name, self._run_dir.root))  # type: ignore[arg-type]
            submission.set_timeout(WHENEVER_MIN, 0)
            submission.dump(folder / PICKLE)
        path = self._run_dir.root / SCRIPT
        write_whole(path, script.encode(), mode=0o755)
        return path

    def submit_components(self, token: str = "", options: tuple[str, ...] = ()) -> dict[str, ComponentsJob]:
        """Submit, exactly once.

        Args:
            token: what the submission is found by, if its answer gets lost.
            options: further ones of sbatch.

        Returns:
            submitit's job of each component: for its results and its state.

        Raises:
            as `commands.submit`.
        """
        job = commands.submit(self.write(), options, token)
        record_job(self._run_dir, job, size=size(self._config))
        return {
            part.name: ComponentsJob(Path(self.folder) / part.name, str(job), list(range(part.tasks)))
            for part in parts_of(self._config)
        }

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return render(self._config, self._run_dir)


def unpack(run_dir: RunDir, config: Config, job: int) -> None:
    """Put each component's pickle where submitit will look for it in this job, and its earlier results away."""
    for part in parts_of(config):
        folder = run_dir.root / "submitit" / part.name
        for result in folder.glob(f"{job}_*_result.pkl"):
            result.unlink()
        shutil.copyfile(folder / PICKLE, folder / f"{job}_submitted.pkl")

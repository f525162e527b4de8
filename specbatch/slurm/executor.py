"""submitit's executor for a job of several components: one folder and one pickle per component, one script for all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from submitit.core.utils import DelayedSubmission
from submitit.slurm import slurm

from specbatch.config import Config
from specbatch.rundir import RunDir, write_whole
from specbatch.slurm import commands
from specbatch.slurm.jobs import record_job
from specbatch.slurm.parts import component_count, parts_of
from specbatch.slurm.script import SCRIPT, render
from specbatch.slurm.task import ComponentTask

PICKLE = "component.pkl"
"""File with a component's function in its folder, for any job; submitit looks for a copy with the job's name."""
WHENEVER_MIN = 1 << 30
"""Time limit for submitit, so large that it never requeues a job by itself; the run does that."""


class ComponentsWatcher(slurm.SlurmInfoWatcher):
    """Handles rows of a heterogeneous job, ``123+0``, ``123+1``: the first component's state is the job's."""

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Return submitit's facts about each job."""
        text = string if isinstance(string, str) else string.decode()
        found = super().read_info(re.sub(r"^(\d+)\+0\|", r"\1|", text, flags=re.M))
        return {job: row | {"State": row["State"].split(" ")[0]} for job, row in found.items()}


class ComponentsJob(slurm.SlurmJob[None]):
    """One component of a job."""

    watcher = ComponentsWatcher(delay_s=600)


class ComponentsExecutor(slurm.SlurmExecutor):
    """Submits all components of a run as one job.

    Args:
        run_dir: gets ``job.sbatch`` and ``submitit/<component>/``.
    """

    job_class = ComponentsJob

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        super().__init__(run_dir.root / "submitit")
        self._run_dir, self._config = run_dir, config

    @classmethod
    def name(cls) -> str:
        """Return the name under which submitit's code inside the job finds it."""
        return "slurm"

    def write(self) -> Path:
        """Write everything that ``sbatch job.sbatch`` needs, and return the script.

        Raises:
            UserError: the run directory's name can't be part of a script.
        """
        script = self._make_submission_file_text("", "")
        for part in parts_of(self._config):
            folder = Path(self.folder) / part.name
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            submission = DelayedSubmission(ComponentTask(part.name, self._run_dir.root))  # type: ignore[arg-type]
            submission.set_timeout(WHENEVER_MIN, 0)
            submission.dump(folder / PICKLE)
        path = self._run_dir.root / SCRIPT
        write_whole(path, script.encode(), mode=0o755)
        return path

    def submit_components(
        self, token: str = "", options: tuple[str, ...] = (), after: int = 0
    ) -> dict[str, ComponentsJob]:
        """Submit, exactly once.

        Args:
            token: finds the submission if its answer gets lost.
            options: further options of sbatch.
            after: the job that it waits for.

        Returns:
            submitit's job of each component, for its results and its state.

        Raises:
            the same as `commands.submit`.
        """
        job = commands.submit(self.write(), options, token)
        record_job(self._run_dir, job, size=component_count(self._config), after=after)
        return {
            part.name: ComponentsJob(Path(self.folder) / part.name, str(job), list(range(part.tasks)))
            for part in parts_of(self._config)
        }

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return render(self._config, self._run_dir)


def unpack(run_dir: RunDir, config: Config, job: int) -> None:
    """Put each component's pickle where submitit looks for it in this job, and remove its earlier results."""
    for part in parts_of(config):
        folder = run_dir.root / "submitit" / part.name
        for result in folder.glob(f"{job}_*_result.pkl"):
            result.unlink()
        shutil.copyfile(folder / PICKLE, folder / f"{job}_submitted.pkl")

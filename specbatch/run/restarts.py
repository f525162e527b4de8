"""Restarts components that were killed, in the same attempt, as long as that leads to progress.

The head is not restarted: without it the attempt has ended. Components restart their own children (ranks that die, an
SGLang that breaks) themselves; this module restarts the components.
"""

from __future__ import annotations

from specbatch.config import Config
from specbatch.metrics_lines import last_step
from specbatch.restart_policy import RestartPolicy
from specbatch.run.exit_records import ExitRecord, read_exit_record, write_exit_record
from specbatch.run.processes import Components
from specbatch.rundir import RunDir
from specbatch.status_file import AnswerCounts, Status, read_status

STEP = 1 << 40
"""Weight of a step: more progress than any number of answers, which come before the first step."""


def reached(run_dir: RunDir) -> int:
    """Return a number that grows with trained steps, and before them with answers."""
    answers = (read_status(run_dir.status) or Status()).answers or AnswerCounts()
    return last_step(run_dir.metrics) * STEP + answers.done


class Restarts:
    """Watches the components of one attempt."""

    def __init__(self, run_dir: RunDir, attempt: int, config: Config, components: Components) -> None:
        self._run_dir, self._attempt, self._components = run_dir, attempt, components
        far = reached(run_dir)
        most = {"inference": config.inference.max_restarts, "training": config.training.max_restarts}
        self._policies = {
            name: RestartPolicy(far, most[task.component])
            for name, task in components.tasks.items()
            if task.component in most
        }

    def look(self) -> list[str]:
        """Restart components that ended without a record, or write a record for those that did so too often.

        Returns:
            a sentence about each component that was found dead.
        """
        said = []
        for name, policy in self._policies.items():
            task = self._components.tasks[name]
            # In this order, since a record is written before the process ends.
            if not task.job.done() or read_exit_record(self._run_dir, self._attempt, task.component, task.number):
                continue
            if policy.again(reached(self._run_dir)):
                self._components.start_again(name)
                said.append(f"{name} was killed and is restarted")
            else:
                why = f"was killed {policy.restarts} times without progress by a step"
                write_exit_record(self._run_dir, self._attempt, ExitRecord(task.component, task.number, why))
                said.append(f"{name} {why}")
        return said

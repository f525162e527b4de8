"""Components that end without a word are started again, in the same attempt, as long as that helps.

The head is none of them: without it the attempt has ended. What a component does about its own children, ranks that die
or an SGLang that breaks, is its own affair; here are those who would have done it.
"""

from __future__ import annotations

from specbatch.config import Config
from specbatch.launch.marks import Mark, leave_mark, read_mark
from specbatch.launch.processes import Components
from specbatch.patience import Patience
from specbatch.rundir import RunDir
from specbatch.training.metrics_file import last_step


class Revival:
    """Watches the components of one attempt."""

    def __init__(self, run_dir: RunDir, attempt: int, config: Config, components: Components) -> None:
        self._run_dir, self._attempt, self._components = run_dir, attempt, components
        reached = last_step(run_dir.metrics)
        most = {"inference": config.inference.max_restarts, "training": config.training.max_restarts}
        self._patience = {
            name: Patience(reached, most[task.component])
            for name, task in components.tasks.items()
            if task.component in most
        }

    def look(self) -> list[str]:
        """Start what ended without a mark, or leave a mark in its name if that happened too often.

        Returns:
            a sentence about each component that was found dead.
        """
        said = []
        for name, patience in self._patience.items():
            task = self._components.tasks[name]
            # In this order: a mark is left before the process ends.
            if not task.job.done() or read_mark(self._run_dir, self._attempt, task.component, task.number):
                continue
            if patience.again(last_step(self._run_dir.metrics)):
                self._components.start_again(name)
                said.append(f"{name} was killed and is started again")
            else:
                why = f"was killed {patience.restarts} times without a step of progress"
                leave_mark(self._run_dir, self._attempt, Mark(task.component, task.number, why))
                said.append(f"{name} {why}")
        return said

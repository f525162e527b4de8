"""The processes of a local run by what they are, found from outside: nothing in specbatch helps."""

from __future__ import annotations

import contextlib
import re

import psutil

from specbatch.rundir import RunDir

GONE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)


class Processes:
    """The processes of one run.

    Args:
        run_dir: of the run.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir

    def attempt(self) -> int:
        """The newest one; 0 before the first."""
        return max(self.run_dir.attempts(), default=0)

    def find(self, kind: str) -> list[psutil.Process]:
        """Living processes of this kind: ``head``, ``master``, ``engine``, ``guard``, ``server``, ``scheduler``,
        ``agent``, ``rank``, or ``head's controller``, ``engine's`` or ``agent's`` (submitit's, above the component)."""
        component = {"head": "head", "engine": "inference", "agent": "training"}.get(kind.removesuffix("'s controller"))
        if component is not None:
            found = self._component(component)
            return _controllers(found) if kind.endswith("'s controller") else found
        if kind == "master":
            return _below(self._component("head"), "mooncake_master")
        if kind == "rank":
            return _below(self._component("training"), "specbatch.training.process.rank")
        if kind == "scheduler":
            return [process for process in _below(self._component("inference"), "") if _captures(process)]
        words = {"guard": "specbatch.inference.guard", "server": "sglang.launch_server"}
        return _below(self._component("inference"), words[kind])

    def all(self) -> list[psutil.Process]:
        """All processes that are left of the run, whatever their parent is."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(*GONE):
                if any(str(self.run_dir.root) in word for word in [*process.cmdline(), *process.environ().values()]):
                    found.append(process)
        return found

    def _component(self, name: str) -> list[psutil.Process]:
        found = []
        for log in sorted((self.run_dir.attempt(self.attempt()) / "logs").glob(f"{name}-*.log")):
            started = re.findall(r"started pid=(\d+)", log.read_text(errors="replace"))
            with contextlib.suppress(*GONE, IndexError):
                process = psutil.Process(int(started[-1]))
                if str(self.run_dir.root) in _words(process):
                    found.append(process)
        return found


def _below(ancestors: list[psutil.Process], word: str) -> list[psutil.Process]:
    """Descendants with a word in their command line that their parents do not have in it."""
    found = []
    for ancestor in ancestors:
        with contextlib.suppress(*GONE):
            for process in ancestor.children(recursive=True):
                if word in _words(process) and _runs(process, word) and not (word and _forked(process)):
                    found.append(process)
    return found


def _runs(process: psutil.Process, word: str) -> bool:
    """Whether the process is what the word names, and not one that starts it."""
    with contextlib.suppress(*GONE):
        if "specbatch.inference.guard" in process.cmdline():
            return word == "specbatch.inference.guard"
        return True
    return False


def _forked(process: psutil.Process) -> bool:
    """Whether it has the whole command line of its parent, as a process that a server of SGLang forks has at first."""
    with contextlib.suppress(*GONE):
        parent = process.parent()
        return parent is not None and process.cmdline() == parent.cmdline()
    return False


def _captures(process: psutil.Process) -> bool:
    """Whether this is the process of SGLang that has the capture plugin, and with it the store's client."""
    with contextlib.suppress(*GONE):
        return any(mapped.path.endswith("mooncake/store.so") for mapped in process.memory_maps())
    return False


def _controllers(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that submitit started above them."""
    found = []
    for process in processes:
        with contextlib.suppress(*GONE):
            parent = process.parent()
            if parent is not None and "submitit.local._local" in _words(parent):
                found.append(parent)
    return found


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(*GONE):
        return " ".join(process.cmdline())
    return ""

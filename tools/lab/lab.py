"""A cluster and its operations: everything that the command `slurmlab` does, for use in tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import sys
from pathlib import Path

from tools.lab import machines
from tools.lab.configuration import FREEZER, GPUS, write_configuration
from tools.lab.errors import LabError
from tools.lab.processes import output, start, succeeds, wait_until
from tools.lab.state import CONTROLLER, USER, State

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv", "pkill")
ACCOUNTING_COMMANDS = ("slurmdbd", "mariadbd", "mariadb-install-db")
SOCKET_CHARACTERS = 107
"""Longest path of a Unix socket."""
IN_SERVICE = ("idle", "mixed", "allocated", "completing", "planned", "reserved")


class Lab:
    """A cluster, identified by the folder with its state. Different folders are independent clusters."""

    def __init__(self, folder: Path, *, tied: bool = False) -> None:
        """
        Args:
            folder: must not be private: the cluster's user reads Slurm's configuration there.
            tied: all processes that are started through this object are killed when this process ends.
        """
        self.folder = folder
        self.tied = tied

    @property
    def state(self) -> State:
        """The cluster as the last command left it; raises `LabError` if there is none."""
        return State.load(self.folder)

    # -- its life ----------------------------------------------------------------------------------------------------

    def up(
        self,
        nodes: int = 6,
        *,
        accounting: bool = True,
        grace_s: int = 10,
        slurm: dict[str, str] | None = None,
        shared: list[Path] | None = None,
    ) -> bool:
        """Start the cluster and wait until its nodes are idle, after removing the remains of a dead one.

        Args:
            accounting: with database, slurmdbd and enforced associations; without, it starts in a third of the time.
            grace_s: seconds between signal and end in the partitions that warn.
            slurm: further settings of slurm.conf.
            shared: paths that the user and the jobs can reach, although a directory above them may be private. This
                repository and its interpreter always are.

        Returns:
            False if it was already up.

        Raises:
            LabError: it can't be started here; nothing is left of it.
        """
        self._check(nodes, accounting)
        if (self.folder / "lab.json").exists():
            if self.dead() == []:
                return False
            self.down()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        state = State(
            self.folder, _free_uid(), nodes, accounting, grace_s, slurm or {}, [*_own_paths(), *(shared or [])]
        )
        state.save()
        try:
            self._start(state)
        except BaseException:
            self.down()
            raise
        return True

    def down(self) -> None:
        """Stop the cluster and remove all of it, including its folder. Do nothing if there is none."""
        if not (self.folder / "lab.json").exists():
            return
        state = self.state
        for name in [*state.names, CONTROLLER, "munge"]:
            if name in state.processes:
                state.processes[name].kill(signal.SIGTERM if name == "munge" else signal.SIGKILL)
        machines.remove_switch(state)
        for name in state.names:
            _remove_cgroups(FREEZER / f"slurm_{name}")
        shutil.rmtree(self.folder)

    def dead(self) -> list[str]:
        """Return the names of processes that should run but do not."""
        state = self.state
        expected = [machines.SWITCH, "munge", CONTROLLER, *state.names]
        return [name for name in expected if name not in state.processes or not state.processes[name].alive()]

    # -- what happens to nodes ---------------------------------------------------------------------------------------

    def kill_node(self, *names: str) -> None:
        """Power loss: every process of the nodes dies without notice to anyone."""
        state = self.state
        for name in state.known(list(names)):
            machines.cut_power(state, name)

    def cut_node(self, *names: str) -> None:
        """Network loss: the nodes keep running, but reach only the shared file system."""
        state = self.state
        for name in state.known(list(names)):
            machines.set_cable(state, name, "down")

    def restore_node(self, *names: str) -> None:
        """Restore power and network; returns when the nodes are in service."""
        state = self.state
        for name in state.known(list(names)):
            if state.processes[name].alive():
                machines.set_cable(state, name, "up")
                # slurmctld would notice a minute later: let slurmd register now.
                succeeds(*machines.enter(state, name), "pkill", "-HUP", "-x", "slurmd")
            else:
                machines.boot_node(state, name, tied=self.tied)
                state.save()
        for name in names:
            listens = ["bash", "-c", f"echo >/dev/tcp/{state.address(name)}/6818"]
            wait_until(f"{name} listens", lambda listens=listens: succeeds(*listens))
            wait_until(f"{name} is in service", lambda name=name: self.node_state(name) in IN_SERVICE)

    def node_state(self, name: str) -> str:
        """Return Slurm's state of a node, such as ``idle`` or ``down*``."""
        return self.run("sinfo", "-h", "-n", name, "-p", "cpu", "-o", "%T").strip()

    def preempt(self, *names: str, nodes: int = 1, seconds: int = 20) -> str:
        """Submit a job that takes nodes from jobs of the preemptable partitions.

        Args:
            names: nodes to take. Default: Slurm chooses ``nodes`` of them.

        Returns:
            its id.
        """
        where = f"--nodelist={','.join(self.state.known(list(names)))}" if names else f"--nodes={nodes}"
        job = [
            "--parsable",
            "--partition=high",
            "--exclusive",
            "--output=/dev/null",
            "--job-name=preemptor",
            "--time=10",
        ]
        return self.run("sbatch", "--parsable", *job, where, f"--wrap=sleep {seconds}").strip()

    def configure(self, *, grace_s: int | None = None, **slurm: str) -> None:
        """Change settings of slurm.conf while it runs."""
        state = self.state
        state.slurm |= slurm
        state.grace_s = state.grace_s if grace_s is None else grace_s
        state.save()
        write_configuration(state)
        self.run("scontrol", "reconfigure")

    # -- commands ----------------------------------------------------------------------------------------------------

    def run(self, *argv: str) -> str:
        """Run a command as administrator and return its output; raises `LabError` if it fails."""
        return output(*argv, environment=self.state.environment())

    def on_node(self, name: str) -> list[str]:
        """Return the command prefix that runs something on a node, as root and outside of any job."""
        state = self.state
        return machines.enter(state, state.known([name])[0])

    def as_user(self) -> list[str]:
        """Return the command prefix that runs something as the ordinary user on the login node."""
        state = self.state
        become = f"--reuid={state.uid} --regid={state.uid} --clear-groups"
        return ["unshare", "--mount", "sh", "-ec", f'{machines.mounts(state)}\nexec setpriv {become} "$@"', "sh"]

    def user_environment(self) -> dict[str, str]:
        """Return the user's environment on the login node: this process's, with a home and a cluster."""
        own = {"HOME": str(self.state.home), "USER": USER, "LOGNAME": USER, "SHELL": "/bin/bash"}
        return dict(os.environ) | own | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    # -- how it is started -------------------------------------------------------------------------------------------

    def _check(self, nodes: int, accounting: bool) -> None:
        if os.geteuid():
            raise LabError("must be root: it makes namespaces; jobs still run as an ordinary user")
        if any(letter.isspace() or letter in "#,'\"" for letter in str(self.folder)):
            raise LabError(f"{self.folder}: slurm.conf allows no blanks and quotes in paths; choose another folder")
        if not 1 <= nodes <= 200:
            raise LabError(f"{nodes} nodes: from 1 to 200")
        # Without its socket, a job's step ends at once, and Slurm does not say why.
        socket = len(f"{self.folder}/spool/node{nodes}/node{nodes}_9999999.4294967295")
        if socket > SOCKET_CHARACTERS:
            raise LabError(
                f"{self.folder}: sockets below it would have paths of {socket} characters, and Linux allows "
                f"{SOCKET_CHARACTERS}; choose a folder with a shorter path"
            )
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        needed = COMMANDS + (ACCOUNTING_COMMANDS if accounting else ())
        if missing := [command for command in needed if not shutil.which(command, path=path)]:
            raise LabError(f"missing: {' '.join(missing)}; `tools/test` installs what is needed, see tools/install.sh")

    def _start(self, state: State) -> None:
        folder, environment = self.folder, state.environment()
        for name, mode in {"log": 0o755, "run": 0o755, "spool": 0o755, "dev": 0o755, "hidden": 0o700, "home": 0o755,
                           "ctld": 0o700}.items():  # fmt: skip
            (folder / name).mkdir(mode=mode)
        os.chown(state.home, state.uid, state.uid)
        machines.make_switch(state, tied=self.tied)
        state.save()
        write_configuration(state)
        for number in range(GPUS):
            os.mknod(folder / f"dev/nvidia{number}", 0o20666, os.makedev(1, 3))  # /dev/null by another name
        key = folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(1024))
        places = {"socket": "munge.socket", "pid-file": "run/munged.pid", "seed-file": "run/munge.seed"}
        places |= {"key-file": "munge.key", "log-file": "log/munged.log"}
        munge = [
            "munged",
            "--foreground",
            "--force",
            *(f"--{option}={folder / path}" for option, path in places.items()),
        ]
        state.processes["munge"] = start(munge, folder / "log/munge.out", environment, tied=self.tied)
        state.save()
        wait_until("munge listens", (folder / "munge.socket").exists)
        machines.boot_controller(state, tied=self.tied)
        wait_until("slurmctld answers", lambda: self._controller_answers(state))
        for name in state.names:
            machines.boot_node(state, name, tied=self.tied)
        state.save()
        idle = ["sinfo", "-h", "-N", "-p", "cpu", "-t", "idle", "-o", "%N"]
        wait_until("nodes are idle", lambda: len(_or_nothing(self, *idle).split()) == state.nodes)

    def _controller_answers(self, state: State) -> bool:
        if not state.processes[CONTROLLER].alive():
            raise LabError(f"the controller's machine ended; see {self.folder}/log/{CONTROLLER}.out")
        return "UP" in _or_nothing(self, "scontrol", "ping")


def _or_nothing(lab: Lab, *argv: str) -> str:
    """Return a command's output; empty while it fails."""
    with contextlib.suppress(LabError):
        return lab.run(*argv)
    return ""


def _own_paths() -> list[Path]:
    """Return the paths of this repository and of its environment's interpreter."""
    environment = REPOSITORY / ".venv"
    interpreter = (environment / "bin/python" if environment.exists() else Path(sys.executable)).resolve()
    real = [REPOSITORY, environment.resolve(), (REPOSITORY / ".cache").resolve(), interpreter.parents[1]]
    return [path for path in dict.fromkeys(real) if path.exists() and path != Path("/usr")]


def _free_uid() -> int:
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return next(uid for uid in range(60100, 60500) if uid not in taken)


def _remove_cgroups(top: Path) -> None:
    """Remove cgroups bottom up; those that another cluster still uses remain."""
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)

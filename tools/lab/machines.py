"""Machines made of namespaces, and the cables between them."""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from pathlib import Path

from tools.lab.configuration import tracks_by_cgroup
from tools.lab.errors import LabError
from tools.lab.processes import output, start, succeeds, wait_until
from tools.lab.state import ACCOUNT, CLUSTER, CONTROLLER, USER, State

SWITCH = "switch"
SWEEP = """
for p in $(grep -ls '^PPid:.1$' /proc/[0-9]*/status | cut -d/ -f3); do
    job=$(tr '\\0' '\\n' 2>/dev/null </proc/$p/environ | sed -n 's/^SLURM_JOB_ID=//p')
    [ -z "$job" ] || grep -q slurmstepd /proc/$p/comm || [ -n "$(squeue -h -j $job -t R -o %i)" ] || kill -9 $p
done"""
"""Script by which a node kills orphans of finished jobs, if Slurm tracks processes by parent."""


def make_switch(state: State, *, tied: bool) -> None:
    """Create the bridge, in a namespace outside of this machine's firewall, and the login node's cable.

    Choose the cluster's network: the first whose device can be created on this machine.
    """
    argv = ["unshare", "--net", "sleep", "infinity"]
    switch = state.processes[SWITCH] = start(argv, state.folder / "log/switch.out", state.environment(), tied=tied)
    wait_until("the switch exists", lambda: _network(switch.pid) != _network(os.getpid()))
    _in_switch(state, "link", "add", "bridge", "type", "bridge")
    _in_switch(state, "link", "set", "bridge", "up")
    peer = ["type", "veth", "peer", "name", "login", "netns", str(switch.pid)]
    taken = output("ip", "-o", "-4", "addr")
    state.net = 1
    while f" 10.213.{state.net}." in taken or not succeeds("ip", "link", "add", state.device, *peer):
        state.net += 1
        if state.net > 254:
            raise LabError("all networks 10.213.1.0/24 to 10.213.254.0/24 are in use")
    output("ip", "addr", "add", f"{state.address('login')}/24", "dev", state.device)
    output("ip", "link", "set", state.device, "up")
    _in_switch(state, "link", "set", "login", "master", "bridge", "up")


def remove_switch(state: State) -> None:
    """Remove the switch, its network and the login node's cable."""
    if SWITCH in state.processes:
        succeeds("ip", "link", "del", state.device)
        state.processes[SWITCH].kill()


def set_cable(state: State, name: str, end: str) -> None:
    """Plug in (``up``) or pull out (``down``) the cable of a node, at the switch's end."""
    _in_switch(state, "link", "set", name, end)


def cable_is_cut(state: State, name: str) -> bool:
    """Return whether a running node can't be reached."""
    return "state DOWN" in _in_switch(state, "-o", "link", "show", name)


def boot_controller(state: State, *, tied: bool) -> None:
    """Start slurmctld, after the database and slurmdbd."""
    folder = state.folder
    daemons = f"slurmctld -D -f {folder}/slurm.conf -c &"
    if state.accounting:
        daemons = f"""
            mkdir /dev/shm/tmp  # names of temporary tables hold the process's number: equal in two clusters
            mariadb-install-db --no-defaults --user=root --datadir=/dev/shm/mysql --tmpdir=/dev/shm/tmp \\
                --skip-test-db --auth-root-authentication-method=normal || exit 1
            mariadbd --no-defaults --user=root --datadir=/dev/shm/mysql --tmpdir=/dev/shm/tmp \\
                --socket={folder}/mysql.sock --port=3306 \\
                --bind-address=127.0.0.1 --skip-grant-tables --innodb-flush-method=nosync \\
                --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 &
            until mariadb-admin --no-defaults --socket={folder}/mysql.sock ping >/dev/null 2>&1; do sleep 0.1; done
            slurmdbd -D &
            until sacctmgr -i add cluster {CLUSTER}; do sleep 0.2; done
            sacctmgr -i add account {ACCOUNT}
            sacctmgr -i add user root,{USER} account={ACCOUNT}
            {daemons}"""
    _boot(state, CONTROLLER, daemons, tied=tied)


def boot_node(state: State, name: str, *, tied: bool) -> None:
    """Start a node and its slurmd."""
    sweep = ":" if tracks_by_cgroup() else SWEEP
    _boot(state, name, f"slurmd -D -N {name} -f {state.folder}/slurm.conf &", sweep, tied=tied)


def cut_power(state: State, name: str) -> None:
    """Kill every process of a node at once, without notice to others: no FIN, no RST leaves the node."""
    if state.processes[name].alive():
        set_cable(state, name, "down")
        state.processes[name].kill()
        succeeds(
            *_switch(state), "link", "del", name
        )  # the kernel does it, too, but only some time after the last process ended


def enter(state: State, name: str) -> list[str]:
    """Return the command prefix that runs something on a machine, outside of any job.

    Raises:
        LabError: the machine has no power.
    """
    if not state.processes[name].alive():
        raise LabError(f"{name} is dead")
    inside = str(state.processes[name].children()[0])
    return ["nsenter", "-t", inside, "--net", "--uts", "--mount", "--pid", "--"]


def mounts(state: State) -> str:
    """Return shell commands that set up a mount namespace: the cluster's names, its user, and the shared paths."""
    lines = [f"mount --bind {state.folder}/{name} /etc/{name}" for name in ("hosts", "passwd", "group")]
    hidden = state.folder / "hidden"
    below = defaultdict(list)
    for path in state.shared:
        if private := next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None):
            below[private].append(path)
    for private, paths in below.items():
        lines += [f"mount --rbind {_quoted(private)} {hidden}", f"mount -t tmpfs -o mode=755 tmpfs {_quoted(private)}"]
        for path in paths:
            lines += [
                f"mkdir -p {_quoted(path)}",
                f"mount --rbind {_quoted(hidden / path.relative_to(private))} {_quoted(path)}",
            ]
        lines.append(f"umount --lazy {hidden}")
    return "\n".join(lines)


def _boot(state: State, name: str, daemons: str, always: str = ":", *, tied: bool) -> None:
    """Start a machine: the first process in its namespaces is a shell that starts the daemons and then reaps orphans.

    It dies with the recorded `unshare` process.
    """
    script = f"""
        hostname {name}
        ip link set lo up
        until ip link set eth0 up 2>/dev/null; do sleep 0.02; done
        ip addr add {state.address(name)}/24 dev eth0
        {mounts(state)}
        mount -t tmpfs -o size=50% shm /dev/shm && mkdir /dev/shm/cgroup
        mount --rbind /sys/fs/cgroup /dev/shm/cgroup && mount -t sysfs none /sys  # for this network namespace
        mount --rbind /dev/shm/cgroup /sys/fs/cgroup && umount -R /dev/shm/cgroup && rmdir /dev/shm/cgroup
        {daemons}
        while :; do sleep 2; {always}; done"""
    own = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    argv = ["unshare", *own, "bash", "-c", script]
    machine = start(argv, state.folder / f"log/{name}.out", state.environment(), tied=tied)
    state.processes[name] = machine
    state.save()
    wait_until(f"{name} has a network", lambda: _network(machine.pid) != _network(os.getpid()))
    switch = str(state.processes[SWITCH].pid)
    peer = ["type", "veth", "peer", "name", name, "netns", switch]
    output("ip", "link", "add", "name", "eth0", "netns", str(machine.pid), *peer)
    _in_switch(state, "link", "set", name, "master", "bridge", "up")


def _network(pid: int) -> int:
    """Return the network namespace of a process."""
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def _switch(state: State) -> list[str]:
    return ["nsenter", "-t", str(state.processes[SWITCH].pid), "--net", "ip"]


def _in_switch(state: State, *argv: str) -> str:
    return output(*_switch(state), *argv)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))

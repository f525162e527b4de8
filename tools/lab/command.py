"""The command `slurmlab`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import tools.lab
from tools.lab import machines
from tools.lab.errors import LabError
from tools.lab.lab import Lab
from tools.lab.state import CONTROLLER

FOLDER = Path(os.environ.get("SLURMLAB_DIR", "/var/lib/slurmlab"))


def up(lab: Lab, arguments: argparse.Namespace) -> None:
    """start a cluster, unless it is up"""
    begun = time.monotonic()
    settings = dict(setting.split("=", 1) for setting in arguments.set)
    new = lab.up(
        arguments.nodes,
        accounting=not arguments.no_accounting,
        grace_s=arguments.grace_s,
        slurm=settings,
        shared=[path.absolute() for path in arguments.share],
    )
    took = f"in {time.monotonic() - begun:.1f} s" if new else "already"
    print(f'slurmlab: {len(lab.state.names)} nodes up {took}; eval "$(slurmlab env)", or: slurmlab login')


def down(lab: Lab, arguments: argparse.Namespace) -> None:
    """stop it and remove everything"""
    lab.down()


def status(lab: Lab, arguments: argparse.Namespace) -> None:
    """daemons, nodes, queue"""
    state, dead = lab.state, lab.dead()
    accounting = "on" if state.accounting else "off"
    print(f"{lab.folder}: network 10.213.{state.net}.0/24, accounting {accounting}")
    for name in ["munge", CONTROLLER, *state.names]:
        cut = name in state.names and name not in dead and machines.cable_is_cut(state, name)
        print(f"  {name:8}{'dead' if name in dead else 'running'}{', network cut' if cut else ''}")
    for command in ("sinfo", "squeue"):
        print(lab.run(command), end="")


def env(lab: Lab, arguments: argparse.Namespace) -> None:
    """print exports for a root shell, with which sbatch, squeue and the others work on this cluster"""
    print(f"export SLURM_CONF={lab.folder}/slurm.conf SLURMLAB_DIR={lab.folder}")


def login(lab: Lab, arguments: argparse.Namespace) -> None:
    """a shell, or a command, of the cluster's ordinary user on the login node"""
    command = [*lab.as_user(), *(arguments.command or ["bash"])]
    os.execvpe(command[0], command, lab.user_environment())


def run_on(lab: Lab, arguments: argparse.Namespace) -> None:
    """run a command on a node, as root, outside of any job"""
    command = lab.on_node(arguments.name) + arguments.command
    os.execvpe(command[0], command, lab.state.environment())


def kill_node(lab: Lab, arguments: argparse.Namespace) -> None:
    """power loss: every process of the nodes dies"""
    lab.kill_node(*arguments.names)


def cut_node(lab: Lab, arguments: argparse.Namespace) -> None:
    """network loss: their processes keep running, unreachable"""
    lab.cut_node(*arguments.names)


def restore_node(lab: Lab, arguments: argparse.Namespace) -> None:
    """power and network back"""
    lab.restore_node(*arguments.names)


def preempt(lab: Lab, arguments: argparse.Namespace) -> None:
    """submit a job of partition high that preempts others; prints its id"""
    print(lab.preempt(*arguments.names, nodes=arguments.nodes, seconds=arguments.seconds))


def conf(lab: Lab, arguments: argparse.Namespace) -> None:
    """change settings of slurm.conf while it runs; also grace_s=N"""
    settings = dict(setting.split("=", 1) for setting in arguments.settings)
    grace_s = settings.pop("grace_s", None)
    lab.configure(grace_s=None if grace_s is None else int(grace_s), **settings)


def main() -> None:
    """Parse the command line and run the command."""
    arguments = _parser().parse_args()
    try:
        arguments.function(Lab(FOLDER), arguments)
    except LabError as error:
        sys.exit(f"slurmlab: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slurmlab",
        description=tools.lab.__doc__,
        epilog="A cluster lives in $SLURMLAB_DIR (default /var/lib/slurmlab); two directories are two clusters.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    added = {}
    for verb in (up, down, status, env, login, run_on, kill_node, cut_node, restore_node, preempt, conf):
        name = verb.__name__.replace("_", "-")
        added[name] = verbs.add_parser(name, help=verb.__doc__)
        added[name].set_defaults(function=verb)
    added["up"].add_argument("--nodes", type=int, default=6)
    added["up"].add_argument("--no-accounting", action="store_true", help="no MariaDB, no slurmdbd, no sacct")
    added["up"].add_argument("--grace-s", type=int, default=10, help="GraceTime of the partitions that warn")
    added["up"].add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of slurm.conf")
    share = "a path that jobs can reach although a directory above it is private; this repository always is"
    added["up"].add_argument("--share", action="append", default=[], type=Path, metavar="PATH", help=share)
    for name in ("kill-node", "cut-node", "restore-node"):
        added[name].add_argument("names", nargs="+")
    added["login"].add_argument("command", nargs=argparse.REMAINDER)
    added["run-on"].add_argument("name")
    added["run-on"].add_argument("command", nargs=argparse.REMAINDER)
    added["preempt"].add_argument("names", nargs="*", help="which nodes; without, Slurm chooses --nodes of them")
    added["preempt"].add_argument("--nodes", type=int, default=1)
    added["preempt"].add_argument("--seconds", type=int, default=20, help="how long it runs")
    added["conf"].add_argument("settings", nargs="+", metavar="KEY=VALUE")
    return parser

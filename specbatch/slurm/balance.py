"""The remaining hours of an account and of those above it, of this user in it, and of a QOS, where the site limits them
in Slurm (``GrpTRESMins``).

Sites that count elsewhere say nothing here.
"""

from __future__ import annotations

import contextlib
import getpass
import re
from collections.abc import Iterator
from dataclasses import dataclass

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.slurm import commands
from specbatch.slurm.check_request import limit_s
from specbatch.slurm.directives import requests
from specbatch.slurm.parts import parts_of

UNITS = {"node": "node-hours", "gres/gpu": "GPU-hours", "cpu": "CPU-hours", "billing": "billing-hours"}
"""What is limited, by Slurm's name of it."""
DEADLINE_S = 20.0
"""How long Slurm is asked: nothing depends on the answer."""


@dataclass(frozen=True)
class Balance:
    """One of the limits that a job of an account is charged to."""

    holder: str
    """What has the limit, in words."""
    kind: str
    """Slurm's name of what is limited: ``node``, ``cpu``, ``gres/gpu``, ``billing``."""
    limit_h: float
    used_h: float

    @property
    def left_h(self) -> float:
        """Return the remaining hours."""
        return max(0.0, self.limit_h - self.used_h)

    def text(self, attempt_h: dict[str, float]) -> str:
        """Return the limit in words.

        Args:
            attempt_h: what an attempt may use at most, by kind, as far as that is known.
        """
        left = f"{self.holder} has {self.left_h:,.1f} of {self.limit_h:,.1f} {UNITS[self.kind]} left"
        most = attempt_h.get(self.kind, 0.0)
        if most <= self.left_h:
            return left
        return f"{left}, less than the {most:,.1f} of an attempt: Slurm may hold the job, or end it early"


def read_balances(account: str, qos: str = "") -> list[Balance]:
    """Ask Slurm for the limits of an account, of this user in it, of the accounts above it, and of a QOS; empty where
    there are none, or Slurm does not say.

    Args:
        account: this user's default one if empty.
        qos: this user's default one if empty.
    """
    found: list[Balance] = []
    user = getpass.getuser()
    with contextlib.suppress(UserError, commands.SlurmError):
        account = account or (commands.sacctmgr("show", "user", user, "format=defaultaccount") or "").strip()
        seen: list[str] = []
        above = account
        while above and above not in seen:
            seen.append(above)
            text = _records(f"accounts={above}", "flags=assoc")
            found += parse_limits(text, above, part=account, user=user if above == account else "")
            above = parse_parent(text, above)
    with contextlib.suppress(UserError, commands.SlurmError):
        if account and not qos:
            where = (f"user={user}", f"account={account}")
            defaults = commands.sacctmgr("show", "assoc", "where", *where, "format=defaultqos") or ""
            qos = next(iter(defaults.split()), "")
        if qos:
            found += parse_qos(_records(f"qos={qos}", "flags=qos"), qos)
    return found


def _records(*words: str) -> str:
    return commands.scontrol("--oneliner", "show", "assoc_mgr", *words, deadline_s=DEADLINE_S)


def parse_limits(text: str, account: str, part: str = "", user: str = "") -> list[Balance]:
    """Return the limits of a whole account, and of a user in it, from ``scontrol --oneliner show assoc_mgr``.

    Args:
        part: the account that the job names, which is this one or below it; this one if empty.
        user: the user whose own limits count, too; only the account's count if empty.
    """
    found: list[Balance] = []
    for facts in _associations(text, account):
        owner = _name(facts.get("UserName", ""))
        if owner and (owner != user or facts.get("Partition")):
            continue
        holder = f"your part of account {account}" if owner else f"account {account}"
        if part.lower() not in ("", account.lower()):
            holder += f", which {part} belongs to,"
        found += _balances(holder, facts)
    return found


def parse_parent(text: str, account: str) -> str:
    """Return the account above an account; empty if there is none."""
    names = (_name(facts.get("ParentAccount", "")) for facts in _associations(text, account))
    return next(filter(None, names), "")


def parse_qos(text: str, qos: str) -> list[Balance]:
    """Return the limits of a QOS from ``scontrol --oneliner show assoc_mgr``."""
    found: list[Balance] = []
    for line in text.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        if _name(facts.get("QOS", "")).lower() == qos.lower():
            found += _balances(f"QOS {qos}", facts)
    return found


def _associations(text: str, account: str) -> Iterator[dict[str, str]]:
    for line in text.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        if facts.get("Account", "").lower() == account.lower():
            yield facts


def _balances(holder: str, facts: dict[str, str]) -> Iterator[Balance]:
    for kind, limit, used in re.findall(r"([^,=]+)=(\d+)\((\d+)\)", facts.get("GrpTRESMins", "")):
        if kind in UNITS:
            yield Balance(holder, kind, int(limit) / 60, int(used) / 60)


def _name(text: str) -> str:
    """Return a name that Slurm shows with its number, as ``root(1)``."""
    return text.partition("(")[0]


def attempt_hours(config: Config) -> dict[str, float]:
    """Return what an attempt uses within its time limit, by Slurm's names of resources."""
    hours = limit_s(config) / 3600
    nodes = sum(int(asked.get("nodes") or 1) for asked in requests(config).values())
    gpus = sum(part.nodes * part.settings.gpus_per_node for part in parts_of(config))
    return {"node": nodes * hours, "gres/gpu": gpus * hours}


def balance_lines(config: Config) -> list[str]:
    """Return a line for each limit of the account that the run is charged to."""
    hours = attempt_hours(config)
    return [balance.text(hours) for balance in read_balances(config.slurm.account, config.slurm.qos)]

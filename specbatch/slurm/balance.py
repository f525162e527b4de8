"""The remaining hours of an account, where the site limits it in Slurm (``GrpTRESMins``).

Sites that count elsewhere say nothing here.
"""

from __future__ import annotations

import getpass
import re
from dataclasses import dataclass

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.slurm import commands
from specbatch.slurm.check_request import limit_s
from specbatch.slurm.script import parts_of, requests

UNITS = {"node": "node-hours", "gres/gpu": "GPU-hours", "cpu": "CPU-hours", "billing": "billing-hours"}
"""What is limited, by Slurm's name of it."""
DEADLINE_S = 20.0
"""How long Slurm is asked: nothing depends on the answer."""


@dataclass(frozen=True)
class Balance:
    """One of an account's limits."""

    account: str
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
        left = f"account {self.account} has {self.left_h:,.1f} of {self.limit_h:,.1f} {UNITS[self.kind]} left"
        most = attempt_h.get(self.kind, 0.0)
        if most <= self.left_h:
            return left
        return f"{left}, less than the {most:,.1f} of an attempt: Slurm may hold the job, or end it early"


def read_balances(account: str) -> list[Balance]:
    """Ask Slurm for an account's limits; empty where there are none, or Slurm does not say.

    Args:
        account: this user's default one if empty.
    """
    try:
        if not account:
            account = (commands.sacctmgr("show", "user", getpass.getuser(), "format=defaultaccount") or "").strip()
        if not account:
            return []
        asked = ("--oneliner", "show", "assoc_mgr", f"accounts={account}", "flags=assoc")
        return parse_limits(commands.scontrol(*asked, deadline_s=DEADLINE_S), account)
    except (UserError, commands.SlurmError):
        return []


def parse_limits(text: str, account: str) -> list[Balance]:
    """Return the limits of a whole account from ``scontrol --oneliner show assoc_mgr``."""
    found = []
    for line in text.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        if facts.get("Account", "").lower() != account.lower() or facts.get("UserName"):
            continue
        for kind, limit, used in re.findall(r"([^,=]+)=(\d+)\((\d+)\)", facts.get("GrpTRESMins", "")):
            if kind in UNITS:
                found.append(Balance(account, kind, int(limit) / 60, int(used) / 60))
    return found


def attempt_hours(config: Config) -> dict[str, float]:
    """Return what an attempt uses within its time limit, by Slurm's names of resources."""
    hours = limit_s(config) / 3600
    nodes = sum(int(asked.get("nodes") or 1) for asked in requests(config).values())
    gpus = sum(part.nodes * part.settings.gpus_per_node for part in parts_of(config))
    return {"node": nodes * hours, "gres/gpu": gpus * hours}


def balance_lines(config: Config) -> list[str]:
    """Return a line for each limit of the account that the run is charged to."""
    hours = attempt_hours(config)
    return [balance.text(hours) for balance in read_balances(config.slurm.account)]

"""The state of a cluster between two commands: one JSON file in its folder, and names and paths derived from it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.lab.errors import LabError
from tools.lab.processes import Started

CLUSTER = "slurmlab"
ACCOUNT = "lab"
USER = "labuser"
CONTROLLER = "ctl"
LAST_BYTE = {"login": 254, CONTROLLER: 253}


@dataclass
class State:
    """A cluster."""

    folder: Path
    uid: int
    """Id of the ordinary user, and of a group of the same name."""
    nodes: int
    accounting: bool
    grace_s: int
    """GraceTime of the partitions that warn."""
    slurm: dict[str, str]
    """Settings of slurm.conf that replace the lab's defaults."""
    shared: list[Path] = field(default_factory=list)
    """Paths that the user can reach although a directory above them is private."""
    net: int = 0
    """The cluster's network is 10.213.<net>.0/24."""
    processes: dict[str, Started] = field(default_factory=dict)
    """First processes by name: ``munge``, ``switch``, the controller's and the nodes' names."""

    @classmethod
    def load(cls, folder: Path) -> State:
        """Read the state from a cluster's folder.

        Raises:
            LabError: there is none.
        """
        try:
            found = json.loads((folder / "lab.json").read_text())
        except FileNotFoundError:
            raise LabError(f"no cluster in {folder}; start one with `slurmlab up`") from None
        found["processes"] = {name: Started(*process) for name, process in found["processes"].items()}
        found["shared"] = list(map(Path, found["shared"]))
        return cls(folder=folder, **found)

    def save(self) -> None:
        """Write the state atomically."""
        facts = asdict(self) | {"shared": list(map(str, self.shared))}
        del facts["folder"]
        new = self.folder / ".lab.json"
        new.write_text(json.dumps(facts, indent=1))
        new.replace(self.folder / "lab.json")

    @property
    def names(self) -> list[str]:
        """All nodes."""
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def gpu_names(self) -> list[str]:
        """The nodes with GPUs: all except the first third."""
        return self.names[max(1, self.nodes // 3) :] or self.names

    @property
    def home(self) -> Path:
        """The user's home, which all nodes see."""
        return self.folder / "home"

    @property
    def device(self) -> str:
        """The login node's network device."""
        return f"slab{self.net}"

    def address(self, name: str) -> str:
        """Return the address of a machine."""
        return f"10.213.{self.net}.{LAST_BYTE.get(name) or int(name.removeprefix('node'))}"

    def environment(self) -> dict[str, str]:
        """Return the environment of daemons and of the administrator's commands."""
        path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
        return {"PATH": path, "HOME": "/root", "LC_ALL": "C.UTF-8", "SLURM_CONF": str(self.folder / "slurm.conf")}

    def known(self, names: list[str]) -> list[str]:
        """Check node names, and return them.

        Raises:
            LabError: one of them does not exist.
        """
        unknown = sorted(set(names) - set(self.names))
        if unknown:
            raise LabError(f"no node {' '.join(unknown)}; there are {' '.join(self.names)}")
        return names

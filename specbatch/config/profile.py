"""Site profiles: configuration files with what is particular to a cluster; the user's own configuration takes
precedence.

They are files of ``slurm/profiles`` in the repository; an installed package has them in ``share/specbatch`` of its
environment.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specbatch.config.document import Document, read_document
from specbatch.errors import UserError

FOLDERS = (
    Path(__file__).resolve().parents[2] / "slurm" / "profiles",
    Path(sys.prefix) / "share" / "specbatch" / "slurm" / "profiles",
)


def profiles() -> dict[str, Path]:
    """Return the profiles that come with specbatch, by name."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def is_path(name: str) -> bool:
    """Return whether ``slurm.profile`` is a path rather than a name."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def read_profile(name: str, base: Path, where: str, hints: Mapping[str, Any]) -> Document:
    """Read a profile.

    Args:
        name: name or path of a profile.
        base: directory that a path is relative to.
        where: place of the name, for messages.

    Raises:
        UserError: there is no such profile, or it has keys that are invalid or that belong to a run.
    """
    if is_path(name):
        path = base / Path(name).expanduser()
    else:
        known = profiles()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}; a path has a / in it"
            raise UserError(f"{where}: slurm.profile: there is no profile {name}; {hint}")
        path = known[name]
    document = read_document(path, hints)
    for key in (*document.texts, *document.mappings):
        if key == "slurm.profile" or key.split(".")[0] in ("run", "target", "data"):
            raise UserError(f"{document.where(key)}: {key}: does not belong in a profile, but in a run's configuration")
    return document

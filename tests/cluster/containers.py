"""A container of Charliecloud's, in which neither this repository nor its Python is where the host has them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = "/opt/venv/bin/python"
"""The Python in the image."""
_FOLDERS = ("usr", "opt/venv", "opt/src/specbatch", "proc", "sys", "dev", "etc", "tmp", "home", "run", "var/lib")


def make_image(image: Path, work: Path) -> str:
    """Make an image that has the host's programs, and a Python with specbatch at a place of its own.

    Args:
        work: a directory that the container sees under the name that it has outside.

    Returns:
        what stands in front of a command, for ``launch``.
    """
    interpreter = Path(sys.executable).resolve().parents[1]
    binds = [str(work), *([] if interpreter == Path("/usr") else [str(interpreter)])]
    for folder in (*_FOLDERS, *(bind.lstrip("/") for bind in binds)):
        (image / folder).mkdir(parents=True, exist_ok=True)
    for link in ("bin", "lib", "lib64", "sbin"):
        (image / link).symlink_to(f"usr/{link}")
    for name in ("hosts", "resolv.conf", "passwd", "group"):
        (image / "etc" / name).touch()
    binds += ["/usr", f"{Path(sys.prefix).resolve()}:/opt/venv", f"{REPOSITORY}/specbatch:/opt/src/specbatch"]
    words = ["ch-run", *(f"--bind={bind}" for bind in binds), "--private-tmp", "--set-env=PYTHONPATH=/opt/src"]
    return f'{shlex.join(words)} --cd="$PWD" {shlex.quote(str(image))} --'

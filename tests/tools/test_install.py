"""One way to make the environment: nothing twice, nothing half, in any directory."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = ["quickstart", "test", "make_target", "make_conversations"]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a package of its own, an environment of one package, and our way to install."""
    root = tmp_path / "it's a repository"
    (root / "tools").mkdir(parents=True)
    shutil.copy(REPOSITORY / "tools" / "install.sh", root / "tools")
    (root / "tools" / "requirements.lock").write_text(f"setuptools=={version('setuptools')}\n")
    (root / "tools" / "requirements-dev.lock").write_text(f"iniconfig=={version('iniconfig')}\n")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "something"\nversion = "1"\n[tool.setuptools]\npackages = []\n'
    )
    return root


def start(repository: Path, argument: str = "") -> subprocess.Popen[str]:
    script = f"set -euo pipefail; source tools/install.sh; install_environment {argument}"
    return subprocess.Popen(["bash", "-c", script], cwd=repository, stdout=subprocess.PIPE, text=True)


def install(repository: Path, argument: str = "") -> str:
    process = start(repository, argument)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


@pytest.mark.light
def test_an_environment_is_made_once_whole_and_in_its_place(repository: Path):
    both = [start(repository), start(repository)]
    outputs = sorted(process.communicate()[0].count("nothing to do") for process in both)
    assert outputs == [0, 1]
    assert "nothing to do" in install(repository)
    assert install(repository, "dev").count("nothing to do") == 1
    assert install(repository, "dev").count("nothing to do") == 2

    marker = repository / ".venv" / "from-before"
    marker.touch()
    (repository / ".venv" / ".unfinished").touch()
    (repository / ".venv" / ".installed-requirements.lock").unlink()
    assert "making .venv anew" in install(repository)
    assert not marker.exists()

    moved = repository.rename(repository.parent / "moved")
    assert "making .venv anew" in install(moved)
    interpreter = moved / ".venv" / "bin" / "python"
    subprocess.run([interpreter, "-c", "import setuptools"], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_called_and_is_sound(name: str):
    script = REPOSITORY / "tools" / name
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


def test_the_environment_is_the_locked_one():
    for name in ("requirements.lock", "requirements-dev.lock"):
        lines = (REPOSITORY / "tools" / name).read_text().splitlines()
        locked = dict(line.split("==") for line in lines if not line.startswith("#"))
        assert {package: version(package) for package in locked} == locked

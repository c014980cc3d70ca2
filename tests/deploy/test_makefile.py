"""Set-up by `make`: which Python it takes, and how it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what the set-up reads, and an empty folder for programs."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    return tmp_path


def python_of_version(checkout: Path, name: str, version: tuple[int, int, int]) -> None:
    """A Python that believes it is of another version."""
    script = checkout / "bin" / name
    pretend = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    script.chmod(0o755)


def make(checkout: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("make")
    assert program is not None
    environment = {"PATH": path or f"{checkout / 'bin'}:/usr/bin:/bin"}
    return subprocess.run([program, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 13, 0)])
def test_other_pythons_are_refused_in_one_sentence(checkout: Path, version: tuple[int, int, int]) -> None:
    python_of_version(checkout, "python3", version)
    done = make(checkout, "venv", "PYTHONS=python3")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert "needs Python 3.11 or 3.12" in said[0]
    assert not (checkout / ".venv").exists()


def test_a_name_on_the_path_that_does_not_run_is_passed_over(checkout: Path) -> None:
    broken = checkout / "bin" / "python3.12"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    python_of_version(checkout, "python3.11", (3, 11, 9))
    python_of_version(checkout, "python3", (3, 10, 0))
    assert make(checkout, "python").stdout.strip() == "python3.11"


def test_the_newer_python_is_preferred(checkout: Path) -> None:
    for name, version in (("python3.12", (3, 12, 3)), ("python3.11", (3, 11, 9))):
        python_of_version(checkout, name, version)
    assert make(checkout, "python").stdout.strip() == "python3.12"


def test_nothing_is_installed_a_second_time(checkout: Path) -> None:
    """With the stamp newer than what it depends on, `make venv` runs no command at all."""
    (checkout / ".venv").mkdir()
    stamp = checkout / ".venv" / ".made"
    stamp.touch()
    newest = max((checkout / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt"))
    os.utime(stamp, (newest + 10, newest + 10))
    assert make(checkout, "--question", "venv").returncode == 0
    os.utime(checkout / "constraints.txt", (newest + 20, newest + 20))
    assert make(checkout, "--question", "venv").returncode == 1


def test_every_target_is_explained(checkout: Path) -> None:
    explained = make(checkout).stdout
    targets = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:")).split()[2:]
    assert [target for target in targets if f"make {target} " not in explained] == []

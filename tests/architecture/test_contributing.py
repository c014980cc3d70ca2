"""The page for contributors, walked: each worked example applies to this tree, passes its checks, and its own test is green."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "docs" / "adding").glob("*.patch"))
TREE = ("api", "benchmarks", "core", "docs", "migrations", "serving", "standalone", "store", "tests", "worker", "pyproject.toml")


def test_every_example_is_named_on_the_page_and_every_link_leads_to_one() -> None:
    linked = re.findall(r"docs/adding/([a-z-]+\.patch)", (ROOT / "CONTRIBUTING.md").read_text())
    assert sorted(set(linked)) == [path.name for path in EXAMPLES] != []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_is_green_in_a_copy_of_the_tree(example: Path, tmp_path: Path) -> None:
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    run("git", "init", "--quiet")  # of its own, so that git does not look for one above
    run("git", "apply", str(example))
    added = re.findall(r"^\+\+\+ b/(tests/\S+)$", example.read_text(), flags=re.MULTILINE)
    assert added, "an example comes with its test"
    run(sys.executable, "-m", "ruff", "check", "--quiet", ".")
    run(sys.executable, "-m", "ruff", "format", "--quiet", "--check", ".")
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tmp'}", *added)
    vocabulary = ("metrics or curves or formats or reason", "tests/architecture/test_vocabulary.py")
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tmp'}", "-k", *vocabulary)

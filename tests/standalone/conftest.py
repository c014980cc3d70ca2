"""Homes for embedded servers: short paths under the temporary folder, passable by the servers' own user, removed after."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def home() -> Iterator[Path]:
    # Not tmp_path: pytest takes away again the permission that root's databases need to pass through its folders.
    folder = Path(tempfile.mkdtemp(prefix="strop-test-"))
    yield folder
    shutil.rmtree(folder)

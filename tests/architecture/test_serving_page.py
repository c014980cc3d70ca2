"""docs/serving.md holds the numbers that the engine computes with."""

import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shapes import config_of
from core.infer import engine
from core.infer.runner import PAGE, kv_bytes_per_token
from tests.conftest import ROOT

PAGE_TEXT = (ROOT / "docs" / "serving.md").read_text()
ROWS = re.findall(r"^\| `([a-z0-9.-]+)` \| ([0-9]+) \| ([0-9,]+) \|$", PAGE_TEXT, re.M)


@pytest.mark.parametrize(("shape", "kib", "tokens"), ROWS)
def test_its_table_of_keys_and_values(shape: str, kib: str, tokens: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(**config_of(shape)), dtype=torch.bfloat16)
    size = kv_bytes_per_token(model)
    assert size == int(kib) * 1024
    assert int(tokens.replace(",", "")) == 2 * 2**30 // size


def test_its_bounds_are_the_engines() -> None:
    assert len(ROWS) == 3
    assert f"up to {engine.STEP_TOKENS} tokens and {engine.RUNNING} requests" in PAGE_TEXT
    assert f"pages of {PAGE} tokens" in PAGE_TEXT

"""A tiny model for the benchmarks' small cases, and one thread."""

from pathlib import Path

import pytest
import torch

from tests.tiny import build_tiny_model

ROWS = Path(__file__).resolve().parents[2] / "examples" / "data" / "alpaca_seed_en.jsonl"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)

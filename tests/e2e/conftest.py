"""One whole service for the end-to-end tests: every process real, the base model tiny."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from standalone.stack import Stack
from tests.e2e.service import Service

TINY_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "STROP_LEASE_SECONDS": "4",
    "STROP_HEARTBEAT_SECONDS": "0.5",
    "STROP_FLUSH_SECONDS": "0.2",
    "STROP_SWEEP_SECONDS": "0.5",
    "STROP_BELL_SECONDS": "3",
    "STROP_POLL_SECONDS": "1",
    "STROP_BASES": "tiny:fp32,tiny:nf4-double:fp32,SmolLM2-135M-Instruct",
}


def tiny_stack(home: Path, tiny_model: Path, **more: Any) -> Stack:
    """A stack over the tiny model, under its own name and the one that the README uses, with leases short enough to wait for."""
    models = home / "models"
    models.mkdir(parents=True, exist_ok=True)
    for name in ("tiny", "SmolLM2-135M-Instruct"):
        os.symlink(tiny_model, models / name)
    _poison(tiny_model, models / "poisoned")
    return Stack(home, settings=TINY_SETTINGS, **more)


def _poison(model: Path, folder: Path) -> None:
    """The same model with a NaN in its last norm: its first loss is not a number."""
    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    with tiny_stack(tmp_path_factory.mktemp("stack"), tiny_model) as stack:
        yield stack


@pytest.fixture(scope="session")
def service(stack: Stack) -> Iterator[Service]:
    service = Service(stack.api_url, stack.serving_url, stack.api_key)
    yield service
    service.close()


@pytest.fixture(scope="session")
def dataset_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 short Alpaca rows, all different."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"instruction": f"Add {n} and {n + 3}.", "input": "", "output": f"The sum is {2 * n + 3}."} for n in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def dataset_id(service: Service, dataset_file: Path) -> str:
    return service.ready_dataset(dataset_file)


def tiny_spec(dataset_id: str, **fields: Any) -> dict[str, Any]:
    """A job of 20 steps on the tiny model, in fp32 so that its numbers repeat to the last bit."""
    return {
        "base_model": "tiny",
        "data": {"datasets": [{"dataset_id": dataset_id}], "max_length": 64, "eval_rows": 8},
        "tuning": {"kind": "lora", "rank": 4, "alpha": 8},
        "optim": {"learning_rate": 0.01},
        "schedule": {"kind": "linear", "epochs": 2},
        "batch": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
        "memory": {"precision": "fp32"},
        "checkpoints": {"every_steps": 5},
        "seed": 7,
    } | fields

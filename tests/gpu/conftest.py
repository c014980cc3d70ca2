"""What only a GPU shows: bf16 gradients, flash attention, liger's kernels, its memory running out. Run by hand there:

    python -m pytest -c /dev/null --rootdir=. --confcutdir=tests/gpu tests/gpu

The options leave out the suite's own settings and services, so that a GPU machine needs no database and no broker.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.catalog import FAMILIES
from core.run import RunInput
from core.spec import JobSpec
from tests.core.train import runs
from tests.tiny import build_tiny_model


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; run by hand, results under benchmarks/results")


@pytest.fixture(autouse=True, scope="session")
def _a_gpu() -> None:
    # Tests of single kernels run in Triton's interpreter too, on a CPU, where this is set.
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is no NVIDIA GPU here")


@pytest.fixture(autouse=True)
def _kernels_taken_out(_a_gpu: None) -> Iterator[None]:
    with kernels_taken_out():
        yield


@contextlib.contextmanager
def kernels_taken_out() -> Iterator[None]:
    """liger swaps names of a family's module for the whole process; a model for a CPU, or for the plain tier, may come next."""
    kinds = {family.name for family in FAMILIES.values()}
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in map(_module_name, kinds)]
    saved = [dict(vars(module)) for module in modules]
    yield
    for module, names in zip(modules, saved, strict=True):
        vars(module).update(names)


def _module_name(model_type: str) -> str:
    return model_type.removesuffix("_text")


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_cache(tmp_path_factory.mktemp("cache") / "tokens", runs.random_rows(40))


def on_gpu(model: Path, cache: Path, spec: JobSpec, resume_from: Path | None = None) -> RunInput:
    return runs.run_input(model, cache, spec, resume_from).model_copy(update={"device": "cuda"})

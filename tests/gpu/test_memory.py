"""A GPU whose memory really runs out: the step is done again with half as much, once; then the run ends and says its peak."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CudaOutOfMemory
from core.run import RunInput
from core.spec import JobSpec
from tests.core.train.runs import losses, random_rows, spec_of, train_here, write_cache
from tests.gpu.conftest import on_gpu
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.gpu

ROWS_PER_STEP = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that what a step keeps outweighs what the allocator rounds."""
    return build_tiny_model(tmp_path_factory.mktemp("wide") / "model", layers=6, hidden=512)


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("long") / "tokens", random_rows(ROWS_PER_STEP * 3, longest=480))


@pytest.fixture(autouse=True)
def _whole_again() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def spec(packing: str) -> JobSpec:
    batch: dict[str, Any] = {"micro_batch_size": ROWS_PER_STEP, "gradient_accumulation_steps": 1, "packing": packing}
    return spec_of(
        batch=batch,
        memory={"precision": "bf16"},
        data={"datasets": [{"dataset_id": "ds_00000000"}], "eval_rows": 0},
        schedule={"max_steps": 3},
    )


def allow(share: float, of: int) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share * of / torch.cuda.get_device_properties(0).total_memory)


def peak_of(run: RunInput, folder: Path) -> tuple[int, list[float]]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    series = losses(train_here(run, folder))
    return torch.cuda.max_memory_allocated(), series


@pytest.mark.parametrize("packing", ["off", "on"])
def test_too_little_memory_halves_what_is_in_it_and_nothing_else(
    model: Path, long_rows: Path, tmp_path: Path, packing: str
) -> None:
    run = on_gpu(model, long_rows, spec(packing))
    peak, whole = peak_of(run, tmp_path / "whole")
    allow(0.9, peak)
    events = train_here(run, tmp_path / "halved")
    warnings = [event for event in events if event.kind == "warning"]
    assert [warning.code for warning in warnings] == ["micro_batch_halved"]
    assert "step 1" in warnings[0].message
    assert losses(events) == pytest.approx(whole, abs=1e-2)


def test_a_second_time_ends_the_run_with_its_peak_and_the_three_knobs(model: Path, long_rows: Path, tmp_path: Path) -> None:
    run = on_gpu(model, long_rows, spec("off"))
    peak, _ = peak_of(run, tmp_path / "whole")
    allow(0.3, peak)
    with pytest.raises(CudaOutOfMemory, match=r"[0-9.]+ GiB of tensors.*micro_batch_size.*max_length.*checkpointing") as raised:
        train_here(run, tmp_path / "ended")
    assert not str(raised.value).startswith("the GPU ran out of memory: 0.00")

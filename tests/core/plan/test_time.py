"""Seconds of a step, from counted products and a GPU's datasheet."""

import subprocess
import sys
from typing import Any

import pytest

from core.plan.coefficients import GPUS, Coefficients, Gpu, find_gpu
from core.plan.time import step_flops, step_seconds
from tests.core.plan.jobs import H100, equal, planned, spec, work

LINEAR = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
HEAD = 32000 * 4096
BIG: dict[str, Any] = {"batch": {"micro_batch_size": 32}}
ROWS = equal(1000, 128)
TOKENS = 32 * 128


def flops(**fields: Any) -> float:
    return step_flops(work(spec(**(BIG | fields)), ROWS))


def test_products_of_a_step_are_counted() -> None:
    attention = 32 * 128 * 4096
    adapter = 19_988_480
    assert flops() == pytest.approx(TOKENS * (4 * LINEAR + 6 * adapter + 6 * attention) + TOKENS / 2 * 4 * HEAD)
    full: dict[str, Any] = {"kind": "full"}
    assert flops(tuning=full) == pytest.approx(TOKENS * (6 * LINEAR + 6 * attention) + TOKENS / 2 * 6 * HEAD)
    again = flops(memory={"checkpointing": True}) - flops()
    assert again == pytest.approx(TOKENS * (2 * LINEAR + 2 * attention))
    half = flops(memory={"checkpointing": True, "checkpointing_every": 2}) - flops()
    assert half == pytest.approx(again / 2)


def test_a_step_is_as_slow_as_the_slower_of_gpu_and_host() -> None:
    gpu = GPUS["H100"]
    job = work(spec(**BIG), ROWS)
    free = Coefficients(traffic_packed=0, traffic_adapter=0, layer_seconds=0, adapter_seconds=0, step_seconds=0, matmul_share=1)
    multiplying = step_flops(job) / 989e12
    assert step_seconds(job, gpu, free) == pytest.approx(multiplying, rel=0.01), "the optimizer moves bytes"
    slow_host = Coefficients(layer_seconds=1.0, adapter_seconds=0.5, step_seconds=0.25)
    assert step_seconds(job, gpu, slow_host) == pytest.approx(32 * (1 + 7 * 0.5) + 0.25)
    split = work(spec(batch={"micro_batch_size": 4, "gradient_accumulation_steps": 8, "packing": "off"}), ROWS)
    assert step_seconds(split, gpu, slow_host) == pytest.approx(8 * 32 * (1 + 7 * 0.5) + 0.25)


def test_a_host_has_nothing_to_tell_where_layers_are_recorded() -> None:
    slow_host = Coefficients(layer_seconds=1.0, adapter_seconds=0.0, fused_share=0.5, step_seconds=0.25)
    fused: dict[str, Any] = {"fused_layers": True, "checkpointing": True}
    apart = [fused, fused | {"checkpointing_offload": True}]
    recorded, offloaded = (step_seconds(work(spec(**BIG, memory=memory), ROWS), GPUS["H100"], slow_host) for memory in apart)
    assert recorded < 2
    assert offloaded == pytest.approx(32 * 0.5 * 4 / 3 + 0.25)


def test_products_of_8_bits_are_faster_and_all_else_is_not() -> None:
    plain, fp8 = (work(spec(**(BIG | {"quantization": {"kind": kind}})), ROWS) for kind in ("none", "fp8"))
    assert step_flops(plain) == step_flops(fp8)
    gpu = Gpu(1e12, 1e30)
    alike, faster = (Coefficients(fp8_speed=speed, matmul_share=1.0, step_seconds=0.0) for speed in (1.0, 2.0))
    before = step_seconds(plain, gpu, alike)
    assert step_seconds(fp8, gpu, alike) == pytest.approx(before)
    assert 0.5 * before < step_seconds(fp8, gpu, faster) < 0.55 * before


def test_the_kind_of_gpu_is_part_of_its_name() -> None:
    assert find_gpu(H100) == GPUS["H100"]
    assert find_gpu("NVIDIA H100 PCIe") == GPUS["H100 PCIe"]
    assert find_gpu("NVIDIA L40S") == GPUS["L40S"]
    assert find_gpu("cpu") is find_gpu("NVIDIA GeForce 256") is find_gpu(None) is None


def test_a_plan_tells_time_where_it_knows_rows_and_gpu() -> None:
    known = planned(spec(), ROWS, gpu=H100)
    assert known.gpu == H100
    assert known.total_tokens == 1000 * 128
    assert known.steps == 250
    assert known.seconds == pytest.approx(250 * known.step_seconds)
    assert planned(spec(), gpu=H100).step_seconds is planned(spec(), ROWS, gpu="cpu").seconds is None


@pytest.mark.parametrize("change", [{"memory": {"checkpointing": True}}, {"batch": {"micro_batch_size": 64, "packing": "off"}}])
def test_what_saves_memory_costs_time(change: dict[str, Any]) -> None:
    batch: dict[str, Any] = {"batch": {"micro_batch_size": 64}}
    more, less = (step_seconds(work(spec(**fields), ROWS), GPUS["H100"]) for fields in (batch | change, batch))
    assert more > less


def test_no_torch_is_loaded_for_a_plan() -> None:
    program = "import sys, core.plan; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)

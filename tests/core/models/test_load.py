"""The one loader: dtypes, quantisation, identity, and gradients that an evaluation in between does not spoil."""

import shutil
from pathlib import Path
from typing import Any, get_args

import bitsandbytes
import pytest
import torch

from core.adapter import Quantization
from core.errors import BadSpec
from core.models.adapt import attach_adapter
from core.models.fp8 import Linear8bit, rows_unrounded
from core.models.load import Precision, dequantized_weight, pick_device, quantization_name, resolve_precision
from core.spec import Fp4Quantization, Fp8Quantization, Int8Quantization, LoraTuning, Nf4Quantization, NoQuantization
from tests.core.models.adapters import load

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("quantization", get_args(Quantization))
def test_trap_8_nothing_of_a_base_is_raised_to_fp32(tiny: Path, quantization: Quantization, precision: Precision) -> None:
    base = load(tiny, quantization, precision)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert base.identity.model_dump() == {
        "model": "test/tiny",
        "weights": "w",
        "quantization": quantization,
        "compute_dtype": precision,
    }
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    four_bit = {n: m for n, m in base.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    eight_bit = {n: m for n, m in base.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}
    floats = {n: m for n, m in base.model.named_modules() if isinstance(m, Linear8bit)}
    assert len(four_bit) == (0 if quantization in ("none", "int8", "fp8") else 2 * 7)
    assert len(eight_bit) == (2 * 7 if quantization == "int8" else 0)
    assert len(floats) == (2 * 7 if quantization == "fp8" else 0)
    for name, parameter in base.model.named_parameters():
        module = name.removesuffix(".weight")
        packed = torch.uint8 if module in four_bit | floats else torch.int8 if module in eight_bit else dtype
        assert parameter.dtype == packed, name
    assert base.model.model.rotary_emb.inv_freq.dtype == torch.float32
    states = {(m.weight.quant_state.quant_type, m.weight.quant_state.nested) for m in four_bit.values()}
    kind, _, double = quantization.partition("-")
    assert states == ({(kind, double == "double")} if four_bit else set())


def test_a_spec_and_an_identity_name_the_same_quantisation() -> None:
    wanted = [NoQuantization(), Int8Quantization(), Fp8Quantization()]
    for double in (False, True):
        wanted += [Nf4Quantization(double_quantization=double), Fp4Quantization(double_quantization=double)]
    assert {quantization_name(each) for each in wanted} == set(get_args(Quantization))
    assert quantization_name(Fp4Quantization()) == "fp4-double"


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4-double", "int8", "fp8"])
def test_a_dequantised_weight_is_what_the_layer_multiplies_with(tiny: Path, quantization: Quantization) -> None:
    model = load(tiny, quantization).model
    linear = model.model.layers[0].mlp.up_proj
    original = load(tiny).model.model.layers[0].mlp.up_proj.weight
    weight = dequantized_weight(linear)
    linear.train()  # in eval mode int8 rounds the inputs as well
    with rows_unrounded(model):
        assert torch.allclose(linear(torch.eye(64)).T, weight, atol=1e-6)
    assert torch.equal(dequantized_weight(linear), weight), "a forward pass moves the scales of int8"
    error = (weight - original).norm() / original.norm()
    bounds = {"none": (0.0, 0.0), "nf4": (0.05, 0.15), "fp4-double": (0.05, 0.25), "int8": (0.001, 0.02), "fp8": (0.02, 0.03)}
    low, high = bounds[quantization]
    assert low <= error <= high


def gradient_norm(model: Any) -> float:
    model.train()
    model.zero_grad()
    ids = torch.arange(4, 60)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("quantization", ["nf4-double", "fp4", "int8", "fp8"])
def test_an_evaluation_leaves_the_gradients_of_a_quantised_base_as_they_were(
    tiny: Path, quantization: Quantization, precision: Precision
) -> None:
    # On a CPU bitsandbytes repacks 4-bit weights in an eval-mode forward, and what is trained afterwards has lost most
    # gradients.
    base = load(tiny, quantization, precision)
    for module in base.model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            assert module.support_avx512bf16_for_cpu is False
    torch.manual_seed(0)
    model = attach_adapter(base.model, LoraTuning(), "test/tiny")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fresh = gradient_norm(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(4, 60)[None])
    assert fresh > 0.01
    assert gradient_norm(model) == fresh


def test_trap_6_adapters_are_fp32_over_any_base(tiny: Path) -> None:
    model = attach_adapter(load(tiny, "nf4", "bf16").model, LoraTuning(rank=3), "test/tiny")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 7
    assert {p.dtype for p in trainable.values()} == {torch.float32}


def test_int8_says_nothing_about_every_layer(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tiny, "int8").model(torch.arange(4, 60)[None])
    assert caplog.records == []


def test_trap_7_auto_is_what_the_device_multiplies_and_never_fp16() -> None:
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert resolve_precision("auto", CPU) == ("bf16" if has_bf16 else "fp32")
    assert resolve_precision("bf16", CPU) == "bf16"
    with pytest.raises(BadSpec, match="fp16 needs a GPU"):
        resolve_precision("fp16", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert pick_device("auto") == CPU
    with pytest.raises(BadSpec, match="none is visible"):
        pick_device("cuda")


def test_pickled_weights_are_never_read(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(folder)

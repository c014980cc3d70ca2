"""The one loader: dtypes, quantisation, identity, and gradients that an evaluation in between does not spoil."""

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from core.errors import BadSpec
from core.models.adapt import attach_lora
from core.models.load import LoadedBase, Precision, Quantization, load_base, pick_device, resolve_precision
from core.spec import LoraTuning
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def load(folder: Path, quantization: Quantization = "none", precision: Precision = "fp32") -> LoadedBase:
    return load_base(folder, name="test/tiny", weights="w", quantization=quantization, precision=precision, device=CPU)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "nf4-double"])
def test_the_identity_says_what_was_loaded(tiny: Path, quantization: Quantization, precision: Precision) -> None:
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
    quantized = {n for n, m in base.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(quantized) == (0 if quantization == "none" else 2 * 7)
    for name, parameter in base.model.named_parameters():
        assert parameter.dtype == (torch.uint8 if name.removesuffix(".weight") in quantized else dtype), name
    assert base.model.model.rotary_emb.inv_freq.dtype == torch.float32
    nested = {m.weight.quant_state.nested for m in base.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert nested == (set() if quantization == "none" else {quantization == "nf4-double"})


def gradient_norm(model: Any) -> float:
    model.train()
    model.zero_grad()
    ids = torch.arange(4, 60)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_evaluation_leaves_the_gradients_of_a_4_bit_base_as_they_were(tiny: Path, precision: Precision) -> None:
    # On a CPU bitsandbytes repacks weights in an eval-mode forward, and what is trained afterwards has lost most gradients.
    base = load(tiny, "nf4-double", precision)
    for module in base.model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            assert module.support_avx512bf16_for_cpu is False
    torch.manual_seed(0)
    model = attach_lora(base.model, LoraTuning(), "test/tiny")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fresh = gradient_norm(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(4, 60)[None])
    assert fresh > 0.01
    assert gradient_norm(model) == fresh


def test_adapters_are_fp32_over_any_base(tiny: Path) -> None:
    model = attach_lora(load(tiny, "nf4", "bf16").model, LoraTuning(rank=3), "test/tiny")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 7
    assert {p.dtype for p in trainable.values()} == {torch.float32}


def test_auto_is_what_the_device_multiplies() -> None:
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

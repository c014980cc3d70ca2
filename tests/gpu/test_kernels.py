"""Fused layers and joined 4-bit weights as a GPU computes them."""

from pathlib import Path

import pytest
import torch
from peft.helpers import disable_input_dtype_casting

from core.adapter import Quantization
from core.eval.rows import collate_packed
from core.models.adapt import attach_adapter
from core.models.documents import DOCUMENTS
from core.models.load import load_base
from core.models.nf4 import join_4bit
from core.spec import LoraTuning, SftObjective
from core.train.fused.elementwise import compiled
from core.train.fused.install import install_fused, uninstall_fused
from core.train.losses import token_loss
from tests.core.models.test_nf4 import KINDS, TOY, WHOLE, layers_of, own
from tests.core.train.fused import FAMILIES, Found, apart, examples
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("outputs", [TOY, WHOLE], ids=["toy", "whole"])
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_the_joined_matrix_is_the_layers_own(cuda: torch.device, kind: str, double: bool, outputs: tuple[int, ...]) -> None:
    layers = [layer.to(cuda) for layer in layers_of(outputs, kind, double)]
    before = own(layers)
    joined = join_4bit(layers)
    assert torch.equal(joined.matrix(torch.float32), before)
    assert torch.equal(own(layers), before), "the layers read the same through their views"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_fused_layers_learn_what_the_packed_tier_learns(
    cuda: torch.device, tmp_path: Path, family: str, quantization: Quantization
) -> None:
    folder = build_tiny_model(tmp_path / "model", family=family, initializer_range=0.1)
    options = {"name": "t", "weights": "0" * 64, "quantization": quantization, "device": cuda}

    def model_in(precision: str) -> torch.nn.Module:
        torch.manual_seed(0)
        model = attach_adapter(load_base(folder, precision=precision, **options).model, LoraTuning(rank=4), "t")
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
        model.get_base_model().set_attn_implementation(DOCUMENTS)
        return model.train()

    def measured(model: torch.nn.Module) -> Found:
        batch = collate_packed(examples(), cuda)
        with torch.autocast("cuda", torch.bfloat16), disable_input_dtype_casting(model):
            sums = token_loss(model, batch, SftObjective()).sums
            sums.sum().backward()
        gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return Found(sums.detach(), gradients)

    model = model_in("bf16")
    packed = measured(model)
    install_fused(model, compiled())
    fused = measured(model)
    uninstall_fused(model)
    again = measured(model)
    distance = apart(packed.gradients, fused.gradients)
    assert distance < 3e-2
    torch.testing.assert_close(fused.sums, packed.sums, rtol=1e-2, atol=0)
    torch.testing.assert_close(again.sums, packed.sums, rtol=1e-6, atol=0)

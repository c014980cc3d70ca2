"""8-bit products of a GPU, and its compiled rounding, against the same numbers multiplied in fp32 on a CPU."""

from pathlib import Path

import pytest
import torch
from peft.helpers import disable_input_dtype_casting

pytest.importorskip("triton", reason="kernels are Triton's, which comes with torch for a GPU")

from core.eval.rows import collate_packed
from core.models.adapt import attach_adapter
from core.models.documents import DOCUMENTS
from core.models.fp8 import Linear8bit, Rounding, rows_in_8_bits, rows_unrounded, scaled_in_8_bits, to_8bit
from core.models.load import load_base
from core.spec import LoraTuning, SftObjective
from core.train.fused.gpu import ON_GPU
from core.train.fused.install import forget_graphs, install_fused, install_graphs
from core.train.losses import token_loss
from tests.core.train.fused import FAMILIES, Found, apart, examples
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.gpu

TOKENS = (1, 7, 16, 130, 1023, 8191)
"""No side of a batch has to be a whole number of anything."""
SHAPES = [(64, 32), (576, 192), (2048, 2560), (4096, 12288), (11008, 4096)]
"""(inputs, outputs)."""


def layer_of(inputs: int, outputs: int, device: torch.device) -> Linear8bit:
    full = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(full.weight, std=0.02, generator=torch.Generator().manual_seed(outputs))
    with torch.no_grad():
        full.weight *= torch.logspace(-2, 1, outputs)[:, None]
    return Linear8bit(full, device, Rounding())


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the row that is furthest off."""
    wide = expected.double()
    return float(((found.double() - wide).norm(dim=-1) / wide.norm(dim=-1)).max())


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_products_are_those_of_the_rounded_factors(cuda: torch.device, inputs: int, outputs: int) -> None:
    """bf16 rounds the result to 2^-9, and the hardware's sums of 8-bit products keep some 14 bits."""
    layer = layer_of(inputs, outputs, cuda)
    weight = layer.matrix().dequantized()
    on_cpu = layer_of(inputs, outputs, torch.device("cpu"))
    assert torch.equal(on_cpu.weight, layer.weight.cpu()), "a device decides nothing about the codes"
    assert torch.equal(on_cpu.scales, layer.scales.cpu())
    found: dict[str, float] = {}
    for tokens in TOKENS:
        torch.manual_seed(tokens)
        x = torch.randn(tokens, inputs, device=cuda, dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.randn(tokens, outputs, device=cuda, dtype=torch.bfloat16)
        y = layer(x)
        y.backward(gradient)
        rows, scales = rows_in_8_bits(x.detach())
        found[f"forward {tokens}"] = far(y.detach(), (rows.double() * scales) @ weight.double().t())
        rows, scales = scaled_in_8_bits(gradient, layer.scales)
        assert x.grad is not None
        found[f"backward {tokens}"] = far(x.grad, (rows.double() * scales / layer.scales) @ weight.double())
    assert max(found.values()) < 1e-2, found


def test_no_row_depends_on_its_neighbours(cuda: torch.device) -> None:
    layer = layer_of(576, 192, cuda)
    x = torch.randn(130, 576, device=cuda, dtype=torch.bfloat16)
    with torch.no_grad():
        whole, alone = layer(x), torch.cat([layer(row[None]) for row in x])
    assert far(whole, alone) < 1e-2, "but for the order of sums"


def test_loading_takes_one_weight_more_than_the_result(cuda: torch.device) -> None:
    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16) for _ in range(16))

        def get_output_embeddings(self) -> None:
            return None

    model = Stack()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    to_8bit(model, cuda)
    assert torch.cuda.memory_allocated() - before < 1.01 * 16 * 4096 * 4096
    assert torch.cuda.max_memory_allocated() - before < (16 + 12) * 4096 * 4096


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_over_8_bit_weights(cuda: torch.device, tmp_path: Path, family: str) -> None:
    """Unrounded as near to the packed tier as with any weights; rounded no further from that than rounding goes."""
    folder = build_tiny_model(tmp_path / "model", family=family, initializer_range=0.1)
    base = load_base(folder, name="t", weights="0" * 64, quantization="fp8", precision="bf16", device=cuda).model
    torch.manual_seed(0)
    model = attach_adapter(base, LoraTuning(rank=4), "t")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    model.get_base_model().set_attn_implementation(DOCUMENTS)
    model.train()

    def measured() -> Found:
        batch = collate_packed(examples(), cuda)
        with torch.autocast("cuda", torch.bfloat16), disable_input_dtype_casting(model):
            sums = token_loss(model, batch, SftObjective()).sums
            sums.sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return Found(sums.detach(), gradients)

    packed = measured()
    with rows_unrounded(model):
        exact = measured()
    install_fused(model, ON_GPU)
    fused = measured()
    install_graphs(model)
    with rows_unrounded(model):
        fused_exact = measured()
    forget_graphs(model)
    graphs = [measured() for _ in range(3)][-1]
    found = {
        "unrounded, fused from packed": apart(exact.gradients, fused_exact.gradients),
        "packed, rounded from unrounded": apart(exact.gradients, packed.gradients),
        "fused, rounded from unrounded": apart(exact.gradients, fused.gradients),
        "fused as graphs, rounded from unrounded": apart(exact.gradients, graphs.gradients),
    }
    assert found["unrounded, fused from packed"] < 3e-2, found
    bearable = max(0.1, 1.5 * found["packed, rounded from unrounded"])
    assert found["fused, rounded from unrounded"] < bearable, found
    assert found["fused as graphs, rounded from unrounded"] < bearable, found
    torch.testing.assert_close(fused.sums, exact.sums, rtol=3e-2, atol=0)

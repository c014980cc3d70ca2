"""Linear layers in 8-bit floats: what is rounded and by how much, exact gradients of what is left, one copy of the codes."""

from pathlib import Path

import pytest
import torch

from core.errors import BadSpec
from core.models.fp8 import Linear8bit, Rounding, check_8bit, join_8bit, part_8bit, rows_in_8_bits, rows_unrounded, to_8bit
from core.models.load import load_base
from tests.core.models.adapters import load

CPU = torch.device("cpu")
HALF_UNIT = 2.0**-4
"""Of e4m3, which has 3 bits behind the leading one: the largest relative error of a number that isn't tiny."""


def layer_of(outputs: int = 48, inputs: int = 64, *, bias: bool = False) -> tuple[torch.nn.Linear, Linear8bit]:
    torch.manual_seed(outputs)
    full = torch.nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        full.weight *= torch.logspace(-3, 2, outputs)[:, None]  # a scale for all of them would lose the small ones
    return full, Linear8bit(full, CPU, Rounding())


def test_each_row_is_rounded_by_a_scale_of_its_own() -> None:
    x = torch.randn(7, 64) * torch.logspace(-20, 20, 7)[:, None]
    x[3] = 0
    codes, scales = rows_in_8_bits(x)
    found = codes.float() * scales
    assert torch.equal(found[3], x[3])
    size = x.abs().amax(-1, keepdim=True)
    within = torch.maximum(HALF_UNIT * x.abs(), size / 448 * 2.0**-10)  # the least step of e4m3 is 2^-9
    assert bool(((found - x).abs() <= within * (1 + 1e-5)).all())
    assert float((found - x).norm(dim=-1)[0] / x.norm(dim=-1)[0]) == pytest.approx(0.026, abs=0.006)
    alone = [rows_in_8_bits(row[None]) for row in x]
    assert torch.equal(torch.cat([one.float() for one, _ in alone]), codes.float()), "no row depends on its neighbours"


def test_what_is_no_number_stays_none() -> None:
    x = torch.ones(2, 16)
    x[1, 3] = float("inf")
    codes, scales = rows_in_8_bits(x)
    found = codes.float() * scales
    assert torch.isfinite(found[0]).all()
    assert not torch.isfinite(found[1]).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_a_product_is_that_of_the_rounded_factors(tokens: int, bias: bool) -> None:
    full, layer = layer_of(bias=bias)
    weight = layer.matrix().dequantized()
    error = ((weight - full.weight).norm(dim=1) / full.weight.norm(dim=1)).detach()
    assert 0.02 < float(error.min()) <= float(error.max()) < 0.035, "every output's weights are as exact as any other's"

    x = torch.randn(tokens, 3, 64, requires_grad=True)
    rows, scales = rows_in_8_bits(x.detach())
    found = layer(x)
    torch.testing.assert_close(found, torch.nn.functional.linear(rows.float() * scales, weight, full.bias))
    close = ((found - full(x)).norm() / full(x).norm()).detach()
    assert 0.01 < float(close) < 0.06, "two factors are off by 2.6% each"


def test_its_gradient_is_that_of_the_rounded_weights() -> None:
    _, layer = layer_of()
    weight = layer.matrix().dequantized()
    x = torch.randn(9, 64, requires_grad=True)
    gradient = torch.randn(9, 48)
    layer(x).backward(gradient)
    rows, scales = rows_in_8_bits(gradient * layer.scales)  # with the outputs' scales, which the sum runs over
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (rows.float() * scales / layer.scales) @ weight)
    assert 0.01 < float((x.grad - gradient @ weight).norm() / (gradient @ weight).norm()) < 0.05
    # Without the rounding of rows nothing is left between the two: numbers that e4m3 holds.
    exact = torch.zeros(9, 48)
    exact[torch.arange(9), torch.arange(9)] = 448.0
    x.grad = None
    layer(x).backward(exact)
    torch.testing.assert_close(x.grad, exact @ weight)


def test_rows_can_be_left_as_they_are(tiny: Path) -> None:
    model = load(tiny, "fp8").model
    layer = model.model.layers[1].mlp.down_proj
    weight = layer.matrix().dequantized()
    x, gradient = torch.randn(9, 128, requires_grad=True), torch.randn(9, 64)
    rounded = layer(x)
    with rows_unrounded(model):
        exact = layer(x)
        exact.backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close(exact, x @ weight.t())
    torch.testing.assert_close(x.grad, gradient @ weight)
    assert not torch.allclose(rounded, exact, rtol=1e-3)
    assert torch.equal(layer(x), rounded)


def test_autocast_decides_the_dtype_of_its_result() -> None:
    _, layer = layer_of(bias=True)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32


def test_joined_layers_are_the_layers_own_in_the_memory_of_one_copy() -> None:
    layers = [layer_of(outputs)[1] for outputs in (64, 32, 48)]
    before = torch.cat([layer.matrix().dequantized() for layer in layers])
    joined = join_8bit(layers)
    assert torch.equal(joined.dequantized(), before)
    assert torch.equal(torch.cat([layer.matrix().dequantized() for layer in layers]), before)
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {joined.codes.untyped_storage().data_ptr()}
    assert {layer.scales.untyped_storage().data_ptr() for layer in layers} == {joined.scales.untyped_storage().data_ptr()}
    part_8bit(layers)
    assert torch.equal(torch.cat([layer.matrix().dequantized() for layer in layers]), before)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 3


def test_what_the_hardware_takes_is_rounded_and_nothing_else(tiny: Path) -> None:
    plain, rounded = load(tiny).model, load(tiny, "fp8").model
    linear = {path for path, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    eight_bit = {path for path, module in rounded.named_modules() if isinstance(module, Linear8bit)}
    assert linear - eight_bit == {"lm_head"}
    others = {name: p for name, p in plain.named_parameters() if name.removesuffix(".weight") not in eight_bit}
    for name, parameter in others.items():
        assert torch.equal(rounded.get_parameter(name), parameter), name

    odd = torch.nn.Module()
    odd.inner = torch.nn.ModuleList([torch.nn.Linear(24, 32), torch.nn.Linear(32, 40), torch.nn.Linear(32, 48)])
    odd.get_output_embeddings = lambda: None  # type: ignore[assignment]
    to_8bit(odd, CPU)
    assert [isinstance(layer, Linear8bit) for layer in odd.inner] == [False, False, True]


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_a_gpu_that_does_not_multiply_8_bit_floats_is_refused_by_name(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    cuda = torch.device("cuda", 0)
    if refused:
        said = r"quantization.kind: fp8 needs .* 8\.9 or higher .* not Some GPU \(8\.\d\): use nf4 or none"
        with pytest.raises(BadSpec, match=said):
            load_base(tiny, name="t", weights="w", quantization="fp8", precision="bf16", device=cuda)
    else:
        check_8bit(cuda, torch.bfloat16)
    with pytest.raises(BadSpec, match=r"set memory\.precision bf16|8\.9"):
        check_8bit(cuda, torch.float32)
    check_8bit(CPU, torch.float32)

"""Joined 4-bit layers are the layers' own weights bit for bit, in the memory of one copy."""

from collections.abc import Sequence
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from core.models.joined import FourBit
from core.models.nf4 import join_4bit, part_4bit

KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
TOY = (64, 32, 48)  # with 64 inputs: 64, 32, 48 blocks, which fill no block of scales
WHOLE = (256, 512, 64)


def layers_of(outputs: Sequence[int], kind: str, double: bool, *, inputs: int = 64, bias: bool = False) -> list[Any]:
    torch.manual_seed(sum(outputs))
    found = []
    for number, size in enumerate(outputs):
        layer = bitsandbytes.nn.Linear4bit(
            inputs, size, bias, compute_dtype=torch.float32, compress_statistics=double, quant_type=kind
        )
        layer.weight.data *= 1 + number  # each layer's scales are about another value
        layer.support_avx512bf16_for_cpu = False
        found.append(layer.to("cpu").requires_grad_(False))
    return found


def own(layers: Sequence[Any]) -> torch.Tensor:
    return torch.cat([dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers])


def memory(layers: Sequence[Any]) -> int:
    """Bytes of all storages under codes and scales, each counted once."""
    states = [layer.weight.quant_state for layer in layers]
    tensors = [layer.weight.data for layer in layers] + [state.absmax for state in states]
    tensors += [state.state2.absmax for state in states if state.nested]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("outputs", [TOY, WHOLE, (96,)], ids=["toy", "whole", "one"])
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_the_joined_matrix_is_the_layers_own(kind: str, double: bool, outputs: tuple[int, ...]) -> None:
    layers = layers_of(outputs, kind, double)
    before, size = own(layers), memory(layers)
    joined = join_4bit(layers)
    assert joined.shape == (sum(outputs), 64)
    assert torch.equal(joined.matrix(torch.float32), before)
    assert len(joined.nested) == (0 if not double else 3 if outputs == TOY else 1)
    narrow = [layer.weight for layer in layers_of(outputs, kind, double)]
    for weight in narrow:
        weight.quant_state.dtype = torch.bfloat16
    expected = torch.cat([dequantize_4bit(weight.data, weight.quant_state) for weight in narrow])
    assert torch.equal(joined.matrix(torch.bfloat16), expected)

    assert torch.equal(own(layers), before), "the layers read the same through their views"
    assert memory(layers) == size
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {joined.codes.untyped_storage().data_ptr()}

    part_4bit(layers)
    assert torch.equal(own(layers), before)
    assert memory(layers) == size
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == len(layers)


def test_quantising_the_joined_weights_anew_would_give_others() -> None:
    layers = layers_of(WHOLE, "nf4", True)
    before = own(layers)
    anew = dequantize_4bit(*quantize_4bit(before, compress_statistics=True, quant_type="nf4"))
    assert 1e-3 < float((anew - before).norm() / before.norm()) < 1e-1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_products_are_the_layers_own(kind: str, double: bool, bias: bool) -> None:
    layers = layers_of(TOY, kind, double, bias=bias)
    x = torch.randn(7, 64, requires_grad=True)
    expected = torch.cat([layer(x) for layer in layers], dim=1)
    gradient = torch.randn_like(expected)
    (of_x,) = torch.autograd.grad(expected, x, gradient)
    joined = join_4bit(layers)
    biases = torch.cat([layer.bias for layer in layers]) if bias else None
    weight = FourBit(joined)
    torch.testing.assert_close(weight.multiply(x.detach(), biases), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.multiply_back(gradient), of_x, rtol=1e-5, atol=1e-5)
    thin, thin_back = (torch.randn(7, 3), torch.randn(3, expected.shape[1])), (torch.randn(7, 3), torch.randn(3, 64))
    both = expected.detach() + thin[0] @ thin[1]
    torch.testing.assert_close(weight.multiply(x.detach(), biases, thin), both, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        weight.multiply_back(gradient, thin_back), of_x + thin_back[0] @ thin_back[1], rtol=1e-5, atol=1e-5
    )
    again = torch.cat([layer(x) for layer in layers], dim=1)
    assert torch.equal(again, expected)
    assert torch.equal(torch.autograd.grad(again, x, gradient)[0], of_x)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (lambda: layers_of((64,), "nf4", True) + layers_of((64,), "fp4", True), "quantised in different ways"),
        (lambda: layers_of((64,), "nf4", True) + layers_of((64,), "nf4", False), "quantised in different ways"),
        (lambda: layers_of((3, 64), "nf4", False, inputs=32), "no whole number of blocks of 64"),
        (lambda: [bitsandbytes.nn.Linear4bit(64, 64)], "not quantised yet"),
    ],
)
def test_what_can_t_be_joined_says_why(layers: Any, reason: str) -> None:
    made = layers()
    pointers = [layer.weight.data_ptr() for layer in made]
    with pytest.raises(ValueError, match=reason):
        join_4bit(made)
    assert [layer.weight.data_ptr() for layer in made] == pointers

"""MoRA's sharing form is what the paper defines, and the LoRA that is written computes the same."""

import pytest
import torch

from core.models.mora import SharedSquare, Spread, as_lora

CPU = torch.device("cpu")


@pytest.mark.parametrize(("inputs", "outputs", "size"), [(64, 32, 27), (30, 70, 10), (16, 16, 16), (5, 9, 5)])
def test_groups_are_summed_multiplied_and_spread(inputs: int, outputs: int, size: int) -> None:
    torch.manual_seed(0)
    square, spread = SharedSquare(inputs, size, CPU).double(), Spread(outputs)
    torch.nn.init.normal_(square.weight)
    x = torch.randn(3, inputs, dtype=torch.float64)
    expected = torch.zeros(3, outputs, dtype=torch.float64)
    for o in range(outputs):
        for j in range(inputs):
            expected[:, o] += square.weight.detach()[o % size, j % size] * x[:, j]
    assert torch.allclose(spread(square(x)), expected)
    down, up = as_lora(square, spread)
    assert (down.shape, up.shape) == ((size, inputs), (outputs, size))
    assert torch.allclose(x @ down.T @ up.T, expected)
    assert set(up.unique().tolist()) == {0.0, 1.0}


def test_sums_of_bf16_inputs_are_not_rounded_on_the_way() -> None:
    square = SharedSquare(1024, 4, CPU)
    torch.nn.init.eye_(square.weight)
    x = torch.full((1, 1024), 1.0, dtype=torch.bfloat16)
    x[0, :4] = 2**-7
    assert torch.equal(square(x), torch.full((1, 4), 255.0 + 2**-7))

"""Linear layers by oneDNN: the same numbers, within a step alone, and what it can't take is left as it is."""

import pytest
import torch

from core.infer.linear import OneDnnLinears


class Doubled(torch.nn.Linear):
    """Stands for a module whose weight is no plain matrix."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.fixture
def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(48, 200), torch.nn.Linear(200, 96, bias=False), Doubled(96, 40))


@pytest.mark.parametrize("rows", [1, 8, 33])
@torch.inference_mode()
def test_numbers_are_those_of_torch(model: torch.nn.Sequential, rows: int) -> None:
    x = torch.randn(1, rows, 48)
    expected = model(x)
    with OneDnnLinears(model).multiplying():
        assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_modules_are_as_they_were_behind_the_block_and_their_hooks_run_in_it(model: torch.nn.Sequential) -> None:
    seen: list[torch.Size] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    linears = OneDnnLinears(model)
    with linears.multiplying():
        assert ["forward" in vars(module) for module in model] == [True, True, False], "a subclass multiplies by itself"
        model(torch.randn(1, 2, 48))
    assert seen == [torch.Size([1, 2, 200])]
    with pytest.raises(RuntimeError, match="primitive"), linears.multiplying():
        model(torch.randn(1, 2, 47))
    assert not any("forward" in vars(module) for module in model)


def test_other_dtypes_are_left_alone(model: torch.nn.Sequential) -> None:
    with OneDnnLinears(model.bfloat16()).multiplying():
        assert not any("forward" in vars(module) for module in model)

"""Kernels of the fused tier against the functions they stand for, in plain torch."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels are Triton's, which comes with torch for a GPU")

from core.models import fp8
from core.train.fused import elementwise
from core.train.fused.gpu import ON_GPU

pytestmark = pytest.mark.gpu

ROUNDING = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


def random(cuda: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=cuda).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rows", "heads"])
@pytest.mark.parametrize("size", [16, 100, 128, 2048, 5120])
def test_norms_and_their_ways_back(cuda: torch.device, size: int, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    if kind == "heads" and size > 128:
        pytest.skip("no head is that wide")
    if kind == "rows":
        x, scale = random(cuda, dtype, 333, size), 1 + 0.1 * random(cuda, dtype, size)
        further = random(cuda, dtype, 333, size)
    else:  # as they lie beside values
        x, scale = random(cuda, dtype, 333, 10 * size).unflatten(1, (-1, size))[:, :8], 1 + 0.1 * random(cuda, dtype, 8, size)
        further = None
    for wanted in (torch.float32, torch.bfloat16):
        near = ROUNDING[torch.bfloat16 if torch.bfloat16 in (dtype, wanted) else torch.float32]
        result, inverse = elementwise.normed(x, scale, 1e-5, wanted)
        found, found_inverse = ON_GPU.normed(x, scale, 1e-5, wanted)
        torch.testing.assert_close(found_inverse, inverse)
        torch.testing.assert_close(found, result, **near)
        torch.testing.assert_close(ON_GPU.normed_again(x, scale, inverse, wanted), result, **near)
        gradient = random(cuda, wanted, *x.shape)
        back = elementwise.normed_back(gradient, x, scale, inverse, further)
        torch.testing.assert_close(ON_GPU.normed_back(gradient, x, scale, inverse, further), back, **near)
        both = elementwise.normed_back_and_again(gradient, x, scale, inverse, further)
        torch.testing.assert_close(ON_GPU.normed_back_and_again(gradient, x, scale, inverse, further), both, **near)
        of_scale = elementwise.normed_back_scale(gradient, x, inverse)
        torch.testing.assert_close(ON_GPU.normed_back_scale(gradient, x, inverse), of_scale, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [100, 32_000, 151_936])
def test_nats_and_their_gradient_in_place(cuda: torch.device, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = 4 * random(cuda, dtype, 77, width), torch.randint(0, width, (77,), device=cuda)
    plain = logits.clone()
    nats = elementwise.nats_in_place(plain, labels)
    torch.testing.assert_close(ON_GPU.nats_in_place(logits, labels), nats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, plain, **ROUNDING[dtype])


@pytest.mark.parametrize("width", [64, 576, 4096, 11_008, 22_016])
def test_rows_are_rounded_to_8_bits_alike(cuda: torch.device, width: int) -> None:
    torch.manual_seed(0)
    factors = torch.logspace(-3, 1, width, device=cuda)
    for tokens in (1, 7, 300):
        x = random(cuda, torch.bfloat16, tokens, width) * torch.logspace(-10, 10, tokens, device=cuda)[:, None].bfloat16()
        x[tokens // 2] = 0
        pairs = [
            (fp8.rows_in_8_bits(x), ON_GPU.rows_in_8_bits(x)),
            (fp8.scaled_in_8_bits(x, factors), ON_GPU.scaled_in_8_bits(x, factors)),
        ]
        for (codes, scales), (found, found_scales) in pairs:
            assert torch.equal(found_scales, scales)
            assert torch.equal(found.view(torch.uint8), codes.view(torch.uint8))
    codes = torch.randint(0, 255, (300, width), device=cuda, dtype=torch.uint8)
    assert torch.equal(ON_GPU.turned_over(codes), fp8.turned_over(codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 1000, 5632])
def test_a_gate_goes_back_in_place(cuda: torch.device, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gradient, both = (torch.randn(77, size, device=cuda, dtype=dtype) for size in (width, 2 * width))
    wanted = gradient.double(), both.double()
    elementwise.gate_back_in_place(*wanted)
    ON_GPU.gate_back_in_place(gradient, both)
    rounding = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close((gradient.double(), both.double()), wanted, **rounding)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("size", "turned"), [(16, 16), (96, 96), (128, 64), (80, 20)])
def test_heads_turn_and_turn_back(cuda: torch.device, size: int, turned: int, paired: bool) -> None:
    torch.manual_seed(0)
    angles = torch.randn(77, turned // 2, device=cuda)
    cos, sin = (torch.cat((part, part), -1)[:, : turned // 2] for part in (angles.cos(), angles.sin()))
    product = torch.randn(77, (6 + 2 + 2) * size, device=cuda, dtype=torch.bfloat16)
    heads = product.unflatten(1, (-1, size))[:, :8]
    wanted, values = heads.clone(), product[:, 8 * size :].clone()
    elementwise.turn_in_place(wanted, cos, sin, paired)
    ON_GPU.turn_in_place(heads, cos, sin, paired)
    torch.testing.assert_close(heads, wanted, rtol=1e-2, atol=1e-2)
    assert torch.equal(product[:, 8 * size :], values), "values stand behind the heads that turn"
    parts = [torch.randn(count, 77, size, device=cuda, dtype=torch.bfloat16).transpose(0, 1) for count in (6, 2, 2)]
    back = elementwise.turned_back(*parts, cos, sin, paired)
    torch.testing.assert_close(ON_GPU.turned_back(*parts, cos, sin, paired), back, rtol=1e-2, atol=1e-2)

"""Attention within short rows against its definition in double precision."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton", reason="kernels are Triton's, which comes with torch for a GPU")

from core.models.short_rows import attend_short_rows

pytestmark = pytest.mark.gpu

LENGTHS = [130, 1, 64, 0, 65, 512, 33, 7]


@pytest.mark.parametrize("times", [1, 8], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 4, 64), (8, 8, 128), (12, 2, 96), (4, 1, 256), (6, 3, 16)])
def test_result_and_gradients_are_those_of_the_definition(
    cuda: torch.device, heads: int, kv_heads: int, size: int, dtype: torch.dtype, times: int
) -> None:
    """Of few rows the heads that share a key go to programs of their own."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS * times)], dtype=torch.int32, device=cuda)
    count = int(bounds[-1])
    joined = torch.randn(count, (heads + 2 * kv_heads) * size, device=cuda, dtype=dtype)
    parts = [p.detach().requires_grad_() for p in joined.unflatten(1, (-1, size)).split([heads, kv_heads, kv_heads], 1)]
    gradient = torch.randn(count, heads, size, device=cuda, dtype=dtype)
    found = attend_short_rows(*parts, bounds, max(LENGTHS), size**-0.5)
    gradients = torch.autograd.grad(found, parts, gradient)
    wide = [part.detach().double().requires_grad_() for part in parts]
    rows = [
        scaled_dot_product_attention(*(part[i:j].transpose(0, 1)[None] for part in wide), is_causal=True, enable_gqa=True)
        for i, j in itertools.pairwise(bounds.tolist())
        if j > i
    ]
    expected = torch.cat([row[0].transpose(0, 1) for row in rows])
    wanted = torch.autograd.grad(expected, wide, gradient.double())
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 6e-3
    again = attend_short_rows(*parts, bounds, max(LENGTHS), size**-0.5)
    assert all(map(torch.equal, torch.autograd.grad(again, parts, gradient), gradients)), "the same in every run"

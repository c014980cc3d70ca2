"""The chunked contrastive losses on a GPU: equal to the plain ones, with fp32 and bf16 products, and small at 65,536 pairs.

Run with -s: one line a case, with its errors, its peak beside the features and its seconds.
"""

import time

import pytest
import torch
from torch.nn.functional import normalize

from core.vision.chunked import chunked_info_nce, chunked_siglip
from core.vision.contrastive import PairIds, info_nce, siglip

pytestmark = pytest.mark.gpu

GIB = 1 << 30


def features(pairs: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that resemble each other, as in a run under way."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(pairs, 512, generator=generator, device=device)
    texts = images + 3 * torch.randn(pairs, 512, generator=generator, device=device)
    return normalize(images, dim=-1).to(dtype).requires_grad_(), normalize(texts, dim=-1).to(dtype).requires_grad_()


def some_alike(pairs: int, device: torch.device) -> PairIds:
    return PairIds(torch.arange(pairs, device=device), torch.arange(pairs, device=device) // 3)


@pytest.mark.parametrize("kind", ["info_nce", "siglip"])
@pytest.mark.parametrize(("products", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_blocks_are_the_matrix(
    cuda: torch.device, kind: str, products: torch.dtype, near: float, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = 5000  # no multiple of a block
    ids, found = some_alike(pairs, cuda), []
    for chunked in (True, False):
        images, texts = features(pairs, cuda)
        scale, bias = torch.tensor(14.3, device=cuda, requires_grad=True), torch.tensor(-10.0, device=cuda, requires_grad=True)
        given = (images, texts, scale) if kind == "info_nce" else (images, texts, scale, bias)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            if chunked:
                loss = (chunked_info_nce if kind == "info_nce" else chunked_siglip)(*given, ids, block=2048, products=products)
            else:
                loss = (info_nce if kind == "info_nce" else siglip)(*given, ids)
        loss.backward()
        found.append([loss.detach(), *(tensor.grad for tensor in given)])
    errors = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(*found, strict=True)]
    with capsys.disabled():
        print(f"\n{kind} {products}: relative errors of loss, images, texts, scale, bias: {[f'{e:.1e}' for e in errors]}")  # noqa: T201
    assert max(errors) < near


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["info_nce", "siglip"])
def test_65536_pairs_take_less_than_a_gib(
    cuda: torch.device, kind: str, products: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    images, texts = features(65536, cuda)
    scale, bias = torch.tensor(14.3, device=cuda, requires_grad=True), torch.tensor(-10.0, device=cuda, requires_grad=True)
    ids = some_alike(65536, cuda)
    seconds = []
    for _ in range(3):
        images.grad = texts.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        if kind == "info_nce":
            chunked_info_nce(images, texts, scale, ids, products=products).backward()
        else:
            chunked_siglip(images, texts, scale, bias, ids, products=products).backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    with capsys.disabled():
        print(f"\n{kind} {products} 65536 x 512: {peak:.3f} GiB beside the features, {min(seconds):.3f} s forward and backward")  # noqa: T201
    assert peak < 1

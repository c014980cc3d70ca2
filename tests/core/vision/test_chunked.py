"""The chunked losses equal the plain ones, value and gradients, and hold no matrix of similarities."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from core.vision.chunked import chunked_info_nce, chunked_siglip
from core.vision.contrastive import PairIds, info_nce, siglip
from tests.core.vision.conftest import LiveBytes

Unit = Callable[..., torch.Tensor]


def gradients(loss: Callable[..., torch.Tensor], *given: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    """The loss and its gradients for all that is given."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    value = loss(*leaves, **options)
    (3 * value).backward()
    return (value.detach(), *(leaf.grad for leaf in leaves))


def assert_equal(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], scale: float) -> None:
    """To 1e-6 of the largest number; past a scale of 16 in step with it, since a logit of 100 has 8e-6 as its last bit."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).abs().max()) <= 1e-6 * max(1.0, scale / 16) * max(1.0, float(other.abs().max()))


def drawn_ids(pairs: int, seed: int, kinds: int) -> PairIds:
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randint(kinds, (2, pairs), generator=generator)
    return PairIds(images, texts)


SHAPES = [(1, 4, 8), (2, 3, 1), (13, 5, 4), (64, 16, 16), (97, 32, 20), (50, 7, 64)]  # pairs, width, block


@pytest.mark.parametrize("alike", [None, 2, 40])
@pytest.mark.parametrize(("pairs", "width", "block"), SHAPES)
def test_it_is_the_plain_info_nce(unit: Unit, pairs: int, width: int, block: int, alike: int | None) -> None:
    ids = None if alike is None else drawn_ids(pairs, seed=pairs, kinds=alike)
    for scale in (1.0, 1 / 0.07, 100.0):
        given = unit(pairs, width, seed=1), unit(pairs, width, seed=2), torch.tensor(scale)
        chunked = gradients(chunked_info_nce, *given, ids=ids, block=block)
        assert_equal(chunked, gradients(info_nce, *given, ids=ids), scale)


@pytest.mark.parametrize("alike", [None, 2, 40])
@pytest.mark.parametrize(("pairs", "width", "block"), SHAPES)
def test_it_is_the_plain_siglip(unit: Unit, pairs: int, width: int, block: int, alike: int | None) -> None:
    ids = None if alike is None else drawn_ids(pairs, seed=pairs, kinds=alike)
    given = unit(pairs, width, seed=1), unit(pairs, width, seed=2), torch.tensor(10.0), torch.tensor([-10.0])
    assert_equal(gradients(chunked_siglip, *given, ids=ids, block=block), gradients(siglip, *given, ids=ids), 10.0)


def test_its_error_is_that_of_fp32_and_no_more(unit: Unit) -> None:
    images, texts, scale = unit(512, 64, seed=1), unit(512, 64, seed=2), torch.tensor(1 / 0.07)
    wide = [tensor.detach().double().requires_grad_() for tensor in (images, texts, scale)]
    logits = wide[0] @ wide[1].T * wide[2]
    exact = (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()).mean() / 2
    exact.backward()
    ours = chunked_info_nce(images, texts, scale.requires_grad_(), block=100)
    ours.backward()
    assert abs(ours.item() - exact.item()) < 1e-6
    for leaf, other in zip((images, texts, scale), wide, strict=True):
        assert float((leaf.grad - other.grad).abs().max()) < 1e-6 * max(1.0, float(other.grad.abs().max()))


def test_features_in_bf16_get_bf16_gradients_of_fp32_sums(unit: Unit) -> None:
    images, texts = unit(40, seed=1, dtype=torch.bfloat16), unit(40, seed=2, dtype=torch.bfloat16)
    scale = torch.tensor(1 / 0.07)
    plain = gradients(info_nce, images.float(), texts.float(), scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = gradients(chunked_info_nce, images, texts, scale, block=16)
    assert chunked[0].dtype == torch.float32
    assert chunked[1].dtype == torch.bfloat16
    torch.testing.assert_close(chunked[0], plain[0])
    torch.testing.assert_close(chunked[3], plain[3])
    torch.testing.assert_close(chunked[1].float(), plain[1], rtol=1e-2, atol=1e-6)


def test_bf16_products_are_near(unit: Unit) -> None:
    given = unit(256, 64, seed=1), unit(256, 64, seed=2), torch.tensor(1 / 0.07)
    exact, rounded = gradients(info_nce, *given), gradients(chunked_info_nce, *given, block=100, products=torch.bfloat16)
    torch.testing.assert_close(rounded[0], exact[0], rtol=2e-3, atol=0)
    for ours, theirs in zip(rounded[1:3], exact[1:3], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
def test_no_tensor_is_larger_than_a_block_or_the_features(unit: Unit, loss: str) -> None:
    pairs, width, block = 2048, 32, 128
    images, texts, scale, bias = unit(pairs, width, 1), unit(pairs, width, 2), torch.tensor(14.0), torch.tensor(-10.0)
    ids = drawn_ids(pairs, 0, kinds=1000)
    with LiveBytes() as counted:
        if loss == "info_nce":
            chunked_info_nce(images, texts, scale.requires_grad_(), ids, block=block).backward()
        else:
            chunked_siglip(images, texts, scale.requires_grad_(), bias.requires_grad_(), ids, block=block).backward()
    assert counted.largest == pairs * width * 4
    assert counted.peak < 2 * pairs * width * 4 + 8 * block * block * 4 + 16 * pairs * 4
    with LiveBytes() as counted:
        info_nce(images, texts, scale, ids).backward()
    assert counted.peak > 3 * pairs * pairs * 4, "the plain formula holds the matrix, so the count counts"


def test_65536_pairs_of_512_need_less_than_a_gib_beside_their_features() -> None:
    with FakeTensorMode():
        images, texts = (torch.empty(65536, 512, requires_grad=True) for _ in range(2))
        scale = torch.empty((), requires_grad=True)
        with LiveBytes() as counted:
            chunked_info_nce(images, texts, scale, PairIds.distinct(65536)).backward()
    assert counted.peak < 1 << 30
    assert counted.peak > 2 * 65536 * 512 * 4, "the gradients themselves were counted"

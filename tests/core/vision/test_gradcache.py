"""A step in chunks has the gradient of the whole batch, dropout, temperature and autocast included."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from core.train.device import random_state, set_random_state
from core.vision.chunked import chunked_info_nce
from core.vision.contrastive import PairIds, info_nce, scale_of
from core.vision.gradcache import Features, backward_in_chunks
from tests.core.vision.conftest import LiveBytes

CPU = torch.device("cpu")
Pairs = tuple[torch.Tensor, torch.Tensor]


class Towers(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 8))
        self.text = nn.Sequential(nn.Linear(10, 24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 8))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode(self, pairs: Pairs) -> Features:
        return normalize(self.image(pairs[0]), dim=-1), normalize(self.text(pairs[1]), dim=-1)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def remember_chance() -> Callable[[], None]:
    return partial(set_random_state, random_state(CPU), CPU)


def drawn(pairs: int) -> Pairs:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(pairs, 12, generator=generator), torch.randn(pairs, 10, generator=generator)


def chunks_of(batch: Pairs, size: int) -> list[Pairs]:
    return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


@pytest.mark.parametrize("size", [1, 3, 8, 20])
@pytest.mark.parametrize("alike", [False, True])
def test_it_is_the_gradient_of_the_whole_batch(size: int, alike: bool) -> None:
    towers, batch = Towers(), drawn(20)
    ids = PairIds(torch.arange(20) // 2, torch.arange(20) % 7) if alike else None

    def loss(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return chunked_info_nce(images, texts, scale_of(towers.logit_scale), ids, block=6)

    whole = info_nce(*towers.encode(batch), scale_of(towers.logit_scale), ids)
    whole.backward()
    expected = towers.gradients()
    towers.zero_grad()
    step = backward_in_chunks(chunks_of(batch, size), towers.encode, loss, remember_chance=remember_chance)
    torch.testing.assert_close(step.loss, whole.detach(), rtol=1e-6, atol=1e-6)
    assert step.images.shape == step.texts.shape == (20, 8)
    assert towers.gradients().keys() == expected.keys()
    for name, grad in towers.gradients().items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)


def test_windows_summed_would_be_another_loss() -> None:
    """What gradient accumulation does to text objectives is wrong here: the reason that this module exists."""
    towers, batch = Towers(), drawn(20)
    whole = info_nce(*towers.encode(batch), scale_of(towers.logit_scale))
    parts = [info_nce(*towers.encode(part), scale_of(towers.logit_scale)) for part in chunks_of(batch, 5)]
    assert abs(whole.item() - sum(part.item() for part in parts) / 4) > 0.1


@pytest.mark.parametrize("size", [4, 16])
def test_dropout_is_the_same_in_both_passes_and_chance_goes_on_as_after_one(size: int) -> None:
    towers, batch = Towers(dropout=0.5), drawn(16)

    def loss(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return info_nce(images, texts, scale_of(towers.logit_scale))

    torch.manual_seed(11)
    sides = [towers.encode(chunk) for chunk in chunks_of(batch, size)]
    loss(torch.cat([images for images, _ in sides]), torch.cat([texts for _, texts in sides])).backward()
    expected, next_number = towers.gradients(), torch.rand(1)
    towers.zero_grad()
    torch.manual_seed(11)
    backward_in_chunks(chunks_of(batch, size), towers.encode, loss, remember_chance=remember_chance)
    assert torch.equal(torch.rand(1), next_number)
    for name, grad in towers.gradients().items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)


def test_a_callers_autocast_does_not_lose_gradients() -> None:
    towers, batch = Towers(), drawn(8)

    def loss(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return info_nce(images, texts, scale_of(towers.logit_scale))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward_in_chunks(chunks_of(batch, 2), towers.encode, loss, remember_chance=remember_chance)
    assert towers.gradients().keys() == dict(towers.named_parameters()).keys()


def test_what_backward_multiplies_by_reaches_towers_and_temperature() -> None:
    towers, batch = Towers(), drawn(8)

    def loss(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return info_nce(images, texts, scale_of(towers.logit_scale))

    cached = partial(backward_in_chunks, chunks_of(batch, 2), towers.encode, loss, remember_chance=remember_chance)
    cached()
    once = towers.gradients()
    towers.zero_grad()
    cached(backward=lambda total: (1024 * total).backward())
    for name, grad in towers.gradients().items():
        torch.testing.assert_close(grad, 1024 * once[name])


def test_a_locked_tower_stays_so() -> None:
    towers, batch = Towers(), drawn(8)
    towers.image.requires_grad_(False)

    def loss(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return info_nce(images, texts, scale_of(towers.logit_scale))

    info_nce(*towers.encode(batch), scale_of(towers.logit_scale)).backward()
    expected = towers.gradients()
    towers.zero_grad()
    backward_in_chunks(chunks_of(batch, 3), towers.encode, loss, remember_chance=remember_chance)
    assert not any(name.startswith("image") for name in towers.gradients())
    for name, grad in towers.gradients().items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)
    towers.text.requires_grad_(False)
    with pytest.raises(ValueError, match="neither tower"):
        backward_in_chunks(chunks_of(batch, 3), towers.encode, loss, remember_chance=remember_chance)


def test_no_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="no chunk"):
        backward_in_chunks([], Towers().encode, torch.add, remember_chance=remember_chance)


def test_a_clip_of_transformers_in_chunks_is_its_own_loss_at_once() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    clip = CLIPModel(
        CLIPConfig(text_config=shape | text, vision_config=shape | {"image_size": 16, "patch_size": 8}, projection_dim=16)
    )
    pixels, ids = torch.randn(10, 3, 16, 16), torch.randint(2, 50, (10, 7))
    ids[:, -2:] = 1
    whole = clip(input_ids=ids, pixel_values=pixels, return_loss=True).loss
    whole.backward()
    expected = {name: p.grad.clone() for name, p in clip.named_parameters()}
    clip.zero_grad()

    def encode(pairs: Pairs) -> Features:
        images = clip.get_image_features(pixel_values=pairs[0]).pooler_output
        return normalize(images, dim=-1), normalize(clip.get_text_features(input_ids=pairs[1]).pooler_output, dim=-1)

    def loss(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return chunked_info_nce(images, texts, scale_of(clip.logit_scale), block=4)

    step = backward_in_chunks(chunks_of((pixels, ids), 4), encode, loss, remember_chance=remember_chance)
    torch.testing.assert_close(step.loss, whole.detach(), rtol=1e-5, atol=1e-6)
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, parameter in clip.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * largest, msg=name)


def test_memory_is_a_chunks_and_the_features() -> None:
    towers = Towers()
    for tower in (towers.image, towers.text):
        tower.insert(2, nn.Linear(24, 2048))
        tower.insert(3, nn.Linear(2048, 24))

    def loss(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return chunked_info_nce(images, texts, scale_of(towers.logit_scale), block=64)

    peaks = []
    for size in (1024, 32):
        towers.zero_grad()
        with LiveBytes() as counted:
            backward_in_chunks(chunks_of(drawn(1024), size), towers.encode, loss, remember_chance=remember_chance)
        peaks.append(counted.peak)
    weights = sum(p.numel() * 4 for p in towers.parameters())
    assert peaks[1] - 2 * weights < (peaks[0] - 2 * weights) / 8

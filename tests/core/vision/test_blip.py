"""BLIP's losses, against transformers where it has them and against formulas where it has none; on tiny real models."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax, normalize
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from core.vision.blip import (
    LABEL_SMOOTHING,
    Encoded,
    JointWeights,
    caption_nats,
    draw_matching_pairs,
    joint_loss,
    matching_nats,
)
from core.vision.captions import collate_captions
from core.vision.contrastive import PairIds, info_nce

Unit = Callable[..., torch.Tensor]
SCALE = torch.tensor(1 / 0.07)


def tiny_config(label_smoothing: float = 0.0) -> BlipConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 60, "encoder_hidden_size": 32, "max_position_embeddings": 16, "bos_token_id": 1, "sep_token_id": 2}
    return BlipConfig(
        text_config=shape | text | {"pad_token_id": 0, "label_smoothing": label_smoothing},
        vision_config=shape | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
        image_text_hidden_size=16,
    )


@dataclass(frozen=True)
class Pairs:
    pixels: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def drawn(captions: list[list[int]], seed: int = 0) -> Pairs:
    rows = collate_captions([[1, *words, 2] for words in captions], prompt_tokens=1, pad=0, special={0, 1, 2})
    pixels = torch.randn(len(captions), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Pairs(pixels, *map(torch.from_numpy, (rows.input_ids, rows.attention_mask, rows.labels)))


class Joint(torch.nn.Module):
    """transformers' retrieval and captioning models over one picture encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.retrieval = BlipForImageTextRetrieval(tiny_config()).eval()
        self.captioning = BlipForConditionalGeneration(tiny_config()).eval()
        self.captioning.vision_model = self.retrieval.vision_model
        self.pictures = 0

    def encode(self, batch: Pairs) -> Encoded:
        self.pictures += 1
        r = self.retrieval
        states = r.vision_model(batch.pixels).last_hidden_state
        texts = r.text_encoder(batch.input_ids, batch.attention_mask).last_hidden_state
        return Encoded(states, normalize(r.vision_proj(states[:, 0]), dim=-1), normalize(r.text_proj(texts[:, 0]), dim=-1))

    def match(self, batch: Pairs, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        ids, mask = batch.input_ids[texts], batch.attention_mask[texts]
        return self.retrieval.itm_head(self.retrieval.text_encoder(ids, mask, encoder_hidden_states=states)[0][:, 0])

    def describe(self, batch: Pairs, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.captioning.text_decoder(batch.input_ids, batch.attention_mask, encoder_hidden_states=states)
        return out.logits, batch.labels


def test_the_caption_loss_is_transformers_with_smoothing_on_purpose() -> None:
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(tiny_config(label_smoothing=LABEL_SMOOTHING)).eval()
    batch = drawn([[5, 6, 7], [8], [9, 10, 11, 12]])
    out = model(batch.pixels, batch.input_ids, batch.attention_mask, labels=batch.labels)
    sums, counts = caption_nats(out.logits, batch.labels)
    assert counts.tolist() == [4, 2, 5]
    torch.testing.assert_close(sums.sum() / counts.sum(), out.loss)
    assert BlipConfig().text_config.label_smoothing == 0, "what a model would be trained with that nobody told"


def test_smoothing_by_its_formula() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 9), torch.tensor([[-100, 3, 8, -100], [-100, -100, 0, 1]])
    for smoothing in (0.0, 0.1):
        sums, counts = caption_nats(logits, labels, smoothing)
        table = -log_softmax(logits, -1)
        own = [[table[0, 0, 3], table[0, 1, 8]], [table[1, 1, 0], table[1, 2, 1]]]
        mean = [table[0, :2].mean(-1).sum(), table[1, 1:3].mean(-1).sum()]
        expected = torch.stack([(1 - smoothing) * sum(a) + smoothing * b for a, b in zip(own, mean, strict=True)])
        torch.testing.assert_close(sums, expected)
        assert counts.tolist() == [2, 2]


def test_a_captions_loss_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, 4, -100, -100, -100]])
    padded, _ = caption_nats(logits, labels)
    alone, _ = caption_nats(logits[:, :3], labels[:, :3])
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kinds", [1, 2, 6, 100])
def test_wrong_pairs_are_wrong(unit: Unit, kinds: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = PairIds(*torch.randint(kinds, (2, 12), generator=generator))
    logits = unit(12, seed=seed) @ unit(12, seed=seed + 1).T * 100
    pairs = draw_matching_pairs(logits, ids, generator)
    shared = ids.shared(slice(None), slice(None))
    assert pairs.match[:12].all()
    assert not pairs.match[12:].any()
    assert torch.equal(pairs.images[:12], torch.arange(12))
    assert torch.equal(pairs.texts[:12], torch.arange(12))
    assert not shared[pairs.images[12:], pairs.texts[12:]].any()
    assert len(pairs.match) == 12 + 2 * int((~shared).any(0).sum())
    if kinds == 1:
        assert len(pairs.match) == 12, "all alike: nothing wrong to be shown"


def test_wrong_pairs_are_drawn_by_their_chances() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.5, 0.0, -1.0], [3.0, 3.0, 0.0]])
    generator, count = torch.Generator().manual_seed(0), 4000
    seen = torch.zeros(2, 3, 3)
    for _ in range(count):
        pairs = draw_matching_pairs(logits, PairIds.distinct(3), generator)
        for part in (0, 1):
            seen[part, pairs.images[3 + 3 * part : 6 + 3 * part], pairs.texts[3 + 3 * part : 6 + 3 * part]] += 1
    masked = logits.masked_fill(torch.eye(3, dtype=torch.bool), -torch.inf)
    torch.testing.assert_close(seen[0] / count, masked.softmax(0), rtol=0, atol=0.03)
    torch.testing.assert_close(seen[1] / count, masked.softmax(1), rtol=0, atol=0.03)


def test_the_joint_loss_is_the_weighted_sum_and_reaches_every_part() -> None:
    model, batch, ids = Joint(), drawn([[5, 6, 7], [8], [9, 10], [8]]), PairIds(torch.arange(4), torch.tensor([0, 1, 2, 1]))
    log_scale = torch.tensor(2.6, requires_grad=True)
    weights = JointWeights(itc=1.0, itm=0.5, lm=2.0)
    found = joint_loss(model, batch, ids, scale=log_scale.exp(), weights=weights, generator=torch.Generator().manual_seed(3))
    assert model.pictures == 1, "one pass of the picture encoder for all three"
    assert found.total.item() == pytest.approx((found.itc + 0.5 * found.itm + 2 * found.lm).item())

    encoded = model.encode(batch)
    torch.testing.assert_close(found.itc, info_nce(encoded.images, encoded.texts, log_scale.exp(), ids).detach())
    logits = (encoded.images @ encoded.texts.T * log_scale.exp()).detach()
    pairs = draw_matching_pairs(logits, ids, torch.Generator().manual_seed(3))
    scores = model.retrieval(
        batch.input_ids[pairs.texts], batch.pixels[pairs.images], attention_mask=batch.attention_mask[pairs.texts]
    ).itm_score
    torch.testing.assert_close(found.itm, cross_entropy(scores, pairs.match).detach())
    torch.testing.assert_close(found.itm, matching_nats(scores, pairs.match).mean().detach())
    told = model.captioning(batch.pixels, batch.input_ids, batch.attention_mask).logits
    assert found.lm == pytest.approx(float(sum(caption_nats(told, batch.labels)[0].tolist()) / (4 + 2 + 3 + 2)), rel=1e-5)

    found.total.backward()
    assert log_scale.grad is not None
    # Nothing reads what a layer-norm makes of the pooled picture, and ITM's head sees first tokens alone.
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert all("post_layernorm" in name or "pooler" in name for name in unused), unused


@pytest.mark.parametrize("part", ["itc", "itm", "lm"])
def test_a_part_of_weight_nothing_is_not_computed(part: str) -> None:
    weights = JointWeights(**{"itc": 0.0, "itm": 0.0, "lm": 0.0} | {part: 1.0})
    found = joint_loss(Joint(), drawn([[5], [6]]), PairIds.distinct(2), scale=SCALE, weights=weights, generator=torch.Generator())
    assert [name for name in ("itc", "itm", "lm") if getattr(found, name) is not None] == [part]
    assert (found.matching_accuracy is None) == (part != "itm")


def test_a_batch_of_one_has_nothing_to_tell_apart() -> None:
    found = joint_loss(
        Joint(), drawn([[5, 6]]), PairIds.distinct(1), scale=SCALE, weights=JointWeights(), generator=torch.Generator()
    )
    assert found.itc == 0
    assert torch.isfinite(found.total)


def test_weights_that_train_nothing_are_refused() -> None:
    for weights in ((0.0, 0.0, 0.0), (1.0, -0.5, 1.0)):
        with pytest.raises(ValueError, match="none below 0, one above"):
            JointWeights(*weights)

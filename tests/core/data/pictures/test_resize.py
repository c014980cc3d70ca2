"""Resize rules against the image processors of transformers, on odd sizes and real photos: the same pixels, and where a crop is
made within the resize, one level off in a value of a thousand at most."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from core.data.pictures.decode import decode_picture
from core.data.pictures.resize import ResizeRule
from core.errors import InvalidInput
from tests.core.data.pictures.draw import DATA, noise

SIZES = [(24, 16), (17, 31), (64, 64), (97, 40), (5, 9), (1, 30)]
PROCESSORS = [
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 33, "width": 28}),
    CLIPImageProcessorPil(size={"shortest_edge": 31}, do_center_crop=False),
    CLIPImageProcessorPil(do_resize=False, crop_size={"height": 30, "width": 31}),
    BlipImageProcessorPil(size={"height": 48, "width": 48}),
    SiglipImageProcessorPil(size={"height": 40, "width": 24}),
    ChineseCLIPImageProcessorPil(size={"height": 32, "width": 32}),
    LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_pad=True),
]


def assert_equal_to(processor: Any, image: Image.Image) -> None:
    config = processor.to_dict()
    rule = ResizeRule.of_processor(config)
    pixels = rule.apply(image)
    values = pixels.astype(np.float64) / 255
    if config["do_normalize"]:
        values = (values - config["image_mean"]) / config["image_std"]
    wanted = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    levels = np.abs(values - wanted) * 255 * (config["image_std"] if config["do_normalize"] else 1)
    off = levels > 1e-3
    if not (rule.size and rule.crop):
        assert not off.any()
    assert levels.max() < 1.001
    assert np.count_nonzero(off) <= max(2, off.size // 1000)


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
def test_pixels_are_those_of_the_models_own_processor(processor: Any) -> None:
    for height, width in SIZES:
        assert_equal_to(processor, Image.fromarray(noise(0, height, width)))


@pytest.mark.skipif(not DATA.is_dir(), reason="the test data is not beside this checkout")
@pytest.mark.parametrize("processor", [CLIPImageProcessorPil(), BlipImageProcessorPil()], ids=["clip-224", "blip-384"])
def test_pixels_of_real_photos_at_real_sizes_are_the_processors(processor: Any) -> None:
    for path in sorted((DATA / "vision" / "pairs" / "images").glob("*.jpg"))[:4]:
        assert_equal_to(processor, decode_picture(path.read_bytes(), path.name).image)


def test_old_configurations_give_sizes_as_bare_numbers() -> None:
    clip = {"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3}
    assert ResizeRule.of_processor(clip) == ResizeRule(224, (224, 224))
    assert ResizeRule.of_processor({"size": 384, "resample": 2}) == ResizeRule((384, 384), None, "bilinear")
    assert ResizeRule.of_processor({"do_resize": False}) == ResizeRule(None)


def test_a_processor_that_does_something_else_is_refused_with_every_reason() -> None:
    config = {"size": {"longest_edge": 9}, "crop_size": {"height": 0, "width": 5}, "do_center_crop": True, "resample": 9}
    with pytest.raises(InvalidInput) as error:
        ResizeRule.of_processor(config)
    assert [(problem.field, problem.code) for problem in error.value.problems] == [
        ("crop_size", "bad-size"),
        ("size", "bad-size"),
        ("resample", "unknown-resample"),
    ]


def test_facts_tell_rules_apart() -> None:
    rules = [
        ResizeRule(8),
        ResizeRule((8, 8)),
        ResizeRule(8, (8, 8)),
        ResizeRule(8, None, "box"),
        ResizeRule(8, square=(1, 2, 3)),
    ]
    assert len({str(rule.facts()) for rule in rules}) == len(rules)


def test_a_loose_rule_leaves_room_to_crop_from_and_cuts_nothing() -> None:
    rule = ResizeRule(32, (32, 32)).loose()
    assert rule.apply(Image.fromarray(noise(0, 100, 200))).shape == (40, 80, 3)
    with pytest.raises(InvalidInput):
        ResizeRule(32).loose()


def test_a_sliver_does_not_become_a_giant() -> None:
    assert ResizeRule(224).apply(Image.fromarray(noise(0, 1, 3000))).shape == (224, 16_384, 3)
    square = ResizeRule((8, 8), square=(1, 2, 3)).apply(Image.new("RGB", (1_000_000, 2), (9, 9, 9)))
    assert square.shape == (8, 8, 3)
    assert square[0, 0].tolist() == [1, 2, 3]

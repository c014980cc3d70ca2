"""CLIP through the loop: one gradient however it is cut, exact resumes, and results that plain libraries read as they are."""

import itertools
import json
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.adapter import AdapterFacts
from core.data.pictures.cache import PictureCache
from core.data.pictures.normalise import Normalisation
from core.data.tokens import TokenCache
from core.errors import BadData, BadSpec
from core.events import Evaluation, Step
from core.manifest import verify_folder
from core.models.adapt import load_adapter
from core.models.load import load_base
from core.run import TokenCacheRef
from core.spec import JobSpec
from core.train.build import build_training
from core.train.contrast import Features, features
from core.train.pairs import Pair, PairChunks, PairRows
from core.train.training import lay_out
from core.vision.contrastive import MAX_LOG_SCALE, PairIds, info_nce, scale_of
from tests.core.train.pairs import DATASET, pair_run, pair_spec, prepared, random_pairs
from tests.core.train.runs import losses, train_here
from tests.tiny import build_tiny_clip

LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}
HELD_OUT = {"datasets": [{"dataset_id": DATASET}], "eval_rows": 4}
Caches = TokenCacheRef
CPU = torch.device("cpu")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Caches:
    return prepared(tmp_path_factory.mktemp("pairs") / "work", clip, *random_pairs(20))


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Caches:
    """Ten pictures with three captions each."""
    return prepared(tmp_path_factory.mktemp("captioned") / "work", clip, *random_pairs(10, captions=3))


@pytest.mark.parametrize("tuning", [{"kind": "full"}, LORA])
def test_the_gradient_of_a_step_does_not_depend_on_its_chunks_and_is_the_plain_formulas(
    clip: Path, pairs: Caches, tuning: dict[str, Any]
) -> None:
    found = {}
    for rows in (8, 3, 1):
        spec = pair_spec(tuning=tuning, batch={"micro_batch_size": rows, "rows_per_step": 8})
        training = build_training(pair_run(clip, pairs, spec))
        assert training.contrast is not None
        laid = lay_out(training, 1)
        loss, curves = training.contrast.backward(
            training.model, laid.batches, compute=training.compute, backward=training.accelerator.backward
        )
        found[rows] = (loss, {name: parameter.grad for name, parameter in training.trainable()})
        assert curves["temperature"].item() == pytest.approx(0.07, rel=1e-6)

    model = training.model.get_base_model() if tuning is LORA else training.model
    training.optimizer.zero_grad()
    pixels = torch.stack([torch.from_numpy(np.array(pair.pixels)) for pair in laid.examples if isinstance(pair, Pair)])
    batch = PairChunks(8).collate(laid.examples, torch.device("cpu"))
    mean, deviation = (torch.tensor(values) for values in (CLIP_MEAN, CLIP_DEVIATION))
    inputs = ((pixels.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)
    images = torch.nn.functional.normalize(model.get_image_features(inputs).pooler_output, dim=-1)
    texts = torch.nn.functional.normalize(model.get_text_features(batch.input_ids).pooler_output, dim=-1)
    plain = info_nce(images, texts, scale_of(training.contrast.log_scale), PairIds(batch.image_ids, batch.text_ids))
    plain.backward()
    found[0] = (plain.double(), {name: parameter.grad for name, parameter in training.trainable()})

    for rows, (loss, gradients) in found.items():
        assert loss.item() == pytest.approx(found[8][0].item(), rel=1e-6), rows
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[8][1][name], rtol=1e-4, atol=1e-6, msg=f"{rows}: {name}")


def test_it_learns_and_says_how(clip: Path, pairs: Caches, tmp_path: Path) -> None:
    spec = pair_spec(data=HELD_OUT, schedule={"epochs": 15.0, "kind": "constant"})
    events = train_here(pair_run(clip, pairs, spec), tmp_path)
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == 30
    assert steps[-1].loss < 0.5 < 1.5 < steps[0].loss
    assert steps[0].temperature == pytest.approx(0.07, rel=1e-6)
    assert steps[-1].temperature != steps[0].temperature
    assert all(0 <= step.alignment <= 4 and -8 <= step.uniformity <= 0 for step in steps)  # type: ignore[operator]
    first, last = (event for event in events if isinstance(event, Evaluation))
    assert (first.step, last.step) == (0, 30)
    assert first.eval_kept_direction == pytest.approx(1, abs=1e-6)
    assert first.eval_retention in (None, pytest.approx(1))
    assert last.eval_kept_direction is not None
    assert last.eval_kept_direction < 0.99
    assert last.eval_image_to_text_recall_at_10 == last.eval_text_to_image_recall_at_10 == 1  # of four


@pytest.mark.parametrize("tuning", [{"kind": "full"}, {"kind": "projection"}, LORA | {"dropout": 0.2}], ids=lambda t: t["kind"])
def test_a_resume_equals_the_uninterrupted_run(clip: Path, pairs: Caches, tmp_path: Path, tuning: dict[str, Any]) -> None:
    spec = pair_spec(tuning=tuning, data=HELD_OUT, checkpoints={"every_steps": 3}, eval={"every_steps": 2, "keep_best": True})
    whole = train_here(pair_run(clip, pairs, spec), tmp_path / "whole")
    resumed = train_here(pair_run(clip, pairs, spec, tmp_path / "whole" / "checkpoints" / "step-3"), tmp_path / "resumed")

    def numbers(events: list[Any]) -> list[dict[str, Any]]:
        timed = {"at", "tokens_per_second", "step_seconds", "eta_seconds", "rss_gib"}
        kept = [event for event in events if event.kind in ("step", "eval") and event.step > 3]
        return [event.model_dump(exclude=timed) for event in kept]

    assert numbers(resumed) == numbers(whole) != []
    weights = "adapter_model.safetensors" if tuning["kind"] == "lora" else "model.safetensors"
    assert (tmp_path / "whole/adapter" / weights).read_bytes() == (tmp_path / "resumed/adapter" / weights).read_bytes()


FRESH_PROCESS = """
# Only transformers, peft and the folder of the result: features of pictures and captions.
import json, sys
import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

result, base, tuning, work = sys.argv[1:]
if tuning == "lora":
    from peft import PeftModel

    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), result).get_base_model()
else:
    model = CLIPModel.from_pretrained(result)
model.eval()
asked = json.load(open(work + "/asked.json"))
tokenizer, processor = AutoTokenizer.from_pretrained(result), CLIPImageProcessorPil.from_pretrained(result)
plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["texts"]]
ids = [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in plain]
pixels = processor([Image.open(path).convert("RGB") for path in asked["images"]], return_tensors="pt")["pixel_values"]
with torch.no_grad():
    texts = torch.cat([model.get_text_features(torch.tensor([row])).pooler_output for row in ids])
    images = model.get_image_features(pixels).pooler_output
found = {name: torch.nn.functional.normalize(side, dim=-1).tolist() for name, side in (("texts", texts), ("images", images))}
print(json.dumps(found | {"temperature": float((-model.logit_scale).exp())}))
"""


@pytest.mark.parametrize(
    ("tuning", "image_tower"), [("full", "locked"), ("projection", "trained"), ("lora", "trained"), ("lora", "locked")]
)
def test_plain_libraries_find_what_was_trained(clip: Path, tmp_path: Path, tuning: str, image_tower: str) -> None:
    """Through their own tokenizer and image processor, from files of the upload: what the loop had in its caches."""
    pictures, rows = random_pairs(8)
    caches = prepared(tmp_path / "work", clip, pictures, rows)
    spec = pair_spec(tuning=LORA if tuning == "lora" else {"kind": tuning}, pictures={"image_tower": image_tower})
    train_here(pair_run(clip, caches, spec), tmp_path)
    result = tmp_path / "adapter"
    facts = AdapterFacts.model_validate(verify_folder(result, "adapter"))
    assert (facts.task, facts.tuning, facts.parity) == ("contrastive", "lora" if tuning == "lora" else "full", None)

    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    asked = {"texts": [row["captions"][0] for row in rows], "images": [str(tmp_path / row["image"]) for row in rows]}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-c", FRESH_PROCESS, str(result), str(clip), tuning, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fresh = json.loads(done.stdout.strip().splitlines()[-1])

    ours, bare = _ours(result, clip, caches, tuning), _ours(clip, clip, caches, "full")
    for side, (trained, before) in {"images": (ours.images, bare.images), "texts": (ours.texts, bare.texts)}.items():
        # A crop made within the resize may be a level of 255 off, here and there (core.data.pictures.resize).
        torch.testing.assert_close(torch.tensor(fresh[side]), trained, rtol=0, atol=1e-5 if side == "texts" else 3e-4)
        assert ((trained - before).abs().max() > 1e-3) == (side == "texts" or image_tower == "trained")
    if tuning != "lora":  # part of a whole model, and it moved
        assert 1e-5 < abs(fresh["temperature"] - 0.07) < 0.02


def _ours(folder: Path, base: Path, caches: Caches, tuning: str) -> Features:
    """Of every row, by our own loaders over the caches."""
    facts: dict[str, Any] = {"name": "n", "weights": "0" * 64, "quantization": "none", "precision": "fp32", "task": "contrastive"}
    model = load_base(base if tuning == "lora" else folder, device=CPU, **facts).model
    if tuning == "lora":
        model = load_adapter(model, folder, "read")
        model.set_adapter("read")
    assert caches.pictures is not None
    rows = PairRows(TokenCache.open(caches.folder), PictureCache.open(caches.pictures))
    pairs = [rows.pair(number) for number in range(len(rows))]
    return features(model, pairs, PairChunks(3), CPU, normalisation=Normalisation.of_model(base), compute=nullcontext)


def test_captions_of_a_picture_are_held_out_together_and_are_no_negatives(clip: Path, captioned: Caches, tmp_path: Path) -> None:
    data = HELD_OUT | {"eval_rows": 3}
    training = build_training(pair_run(clip, captioned, pair_spec(data=data)))
    rows = training.rows
    held = {pair.image_id for pair in rows.eval_rows if isinstance(pair, Pair)}
    assert (len(held), rows.eval_count, rows.train_rows) == (3, 9, 21)
    drawn = [pair for step in range(1, 4) for pair in rows.step_rows(step)]
    assert not held & {pair.image_id for pair in drawn if isinstance(pair, Pair)}
    (first, second) = (
        event for event in train_here(pair_run(clip, captioned, pair_spec(data=data)), tmp_path) if event.kind == "eval"
    )
    assert first.eval_image_to_text_recall_at_5 is not None
    assert second.eval_trained_tokens == first.eval_trained_tokens > 0


def test_the_last_step_of_an_epoch_is_as_large_as_the_others_and_repeats_nothing(clip: Path, pairs: Caches) -> None:
    rows = build_training(pair_run(clip, pairs, pair_spec())).rows
    assert (rows.train_rows, rows.steps_per_epoch) == (20, 3)

    def drawn(step: int) -> list[int]:
        return [pair.image_id for pair in rows.step_rows(step) if isinstance(pair, Pair)]

    for step in range(1, 7):
        assert len(set(drawn(step))) == len(drawn(step)) == 8
    assert len({*drawn(1), *drawn(2), *drawn(3)}) == 20
    ahead = [number for number in (*drawn(4), *drawn(5)) if number not in drawn(3)[:4]]
    assert drawn(3)[4:] == ahead[:4], "filled with what the next epoch begins with"


def test_the_temperature_is_held_and_stays_where_it_is_to_stay(clip: Path, pairs: Caches, tmp_path: Path) -> None:
    hot = pair_spec(objective={"kind": "info_nce", "temperature": 0.011}, optim={"learning_rate": 0.2}, schedule={"max_steps": 6})
    series = [event.temperature for event in train_here(pair_run(clip, pairs, hot), tmp_path / "a") if isinstance(event, Step)]
    assert min(value for value in series if value is not None) >= math.exp(-MAX_LOG_SCALE) * (1 - 1e-6)
    fixed = pair_spec(objective={"kind": "info_nce", "temperature": 0.5, "learn_temperature": False}, schedule={"max_steps": 3})
    series = [event.temperature for event in train_here(pair_run(clip, pairs, fixed), tmp_path / "b") if isinstance(event, Step)]
    assert series == [pytest.approx(0.5, rel=1e-6)] * 3
    own = pair_spec(objective={"kind": "info_nce", "temperature": None}, tuning=LORA, schedule={"max_steps": 1})
    (step,) = (event for event in train_here(pair_run(clip, pairs, own), tmp_path / "c") if isinstance(event, Step))
    assert step.temperature == pytest.approx(math.exp(-2.6592), rel=1e-4), "what a fresh CLIPModel has"


def test_lora_stands_on_the_tower_that_trains_alone(clip: Path, pairs: Caches) -> None:
    for locked, towers in (("locked", {"text_model"}), ("trained", {"text_model", "vision_model"})):
        spec = pair_spec(tuning=LORA | {"target_modules": ["q_proj", "fc2"]}, pictures={"image_tower": locked})
        training = build_training(pair_run(clip, pairs, spec))
        names = [name.removeprefix("base_model.model.") for name, _ in training.trainable()]
        assert {name.split(".")[0] for name in names} == towers
        assert len(names) == 2 * 2 * 2 * len(towers)
    spec = pair_spec(tuning=LORA | {"target_modules": ["visual_projection"]}, pictures={"image_tower": "locked"})
    with pytest.raises(BadSpec, match="visual_projection"):
        build_training(pair_run(clip, pairs, spec))


def test_what_can_not_be_trained_is_refused_by_name(clip: Path, pairs: Caches, tmp_path: Path) -> None:
    too_many = pair_spec(data=HELD_OUT | {"eval_rows": 20})
    with pytest.raises(BadData, match="20 of 20 distinct pictures leaves none to train on"):
        build_training(pair_run(clip, pairs, too_many))
    with pytest.raises(BadSpec, match="test/clip is a CLIPModel, a model for task contrastive; what is asked for is causal_lm"):
        load_base(clip, name="test/clip", weights="0" * 64, quantization="none", precision="fp32", device=CPU)
    alone = prepared(tmp_path / "alone", clip, *random_pairs(1, captions=3))
    with pytest.raises(BadData, match="one picture to train on"):
        build_training(pair_run(clip, alone, pair_spec()))
    odd = build_tiny_clip(tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 5
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadSpec, match="ends texts with id 1, and its config says 5"):
        build_training(pair_run(odd, pairs, pair_spec()))


def test_a_first_step_of_one_picture_alone_is_no_fault(clip: Path, tmp_path: Path) -> None:
    """Its captions are no negatives of each other: there is no loss and no gradient, and the next step has both."""
    caches = prepared(tmp_path / "work", clip, *random_pairs(2, captions=2))
    batch = {"micro_batch_size": 2, "rows_per_step": 2}
    specs = (pair_spec(seed=seed, batch=batch, schedule={"epochs": 4.0}) for seed in range(100))

    def begins_with_one_picture(spec: JobSpec) -> bool:
        first = build_training(pair_run(clip, caches, spec)).rows.step_rows(1)
        return len({pair.image_id for pair in first if isinstance(pair, Pair)}) == 1

    series = losses(train_here(pair_run(clip, caches, next(filter(begins_with_one_picture, specs))), tmp_path / "run"))
    assert series[0] == 0 < max(series)


def test_losses_go_down_by_every_tuning(clip: Path, pairs: Caches, tmp_path: Path) -> None:
    for number, tuning in enumerate([{"kind": "projection"}, LORA, LORA | {"dora": True}, LORA | {"init": "pissa", "rank": 2}]):
        spec: JobSpec = pair_spec(tuning=tuning, optim={"learning_rate": 5e-3}, schedule={"epochs": 4.0})
        series = losses(train_here(pair_run(clip, pairs, spec), tmp_path / str(number)))
        assert np.mean(series[-3:]) < np.mean(series[:3]), tuning
        assert all(math.isfinite(one) for one in itertools.chain(series))

"""Proof that CLIP learns: from random weights it finds nearly every one of 400 small pictures by its name, and the reverse."""

import zipfile
from contextlib import nullcontext
from pathlib import Path

import torch

from core.data.pictures.cache import PictureCache
from core.data.pictures.normalise import Normalisation
from core.data.tokens import TokenCache
from core.models.load import load_base
from core.train.contrast import features, recall_of
from core.train.pairs import PairChunks, PairRows
from tests.core.train.pairs import pair_run, pair_spec, prepare_upload
from tests.core.train.runs import train_here
from tests.tiny import build_tiny_clip

CPU = torch.device("cpu")


def test_from_random_weights_nine_in_ten_training_pairs_are_found_first(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "vision" / "emoji_pairs"
    upload = tmp_path / "emoji.zip"
    with zipfile.ZipFile(upload, "w") as archive:
        for picture in sorted((folder / "images").iterdir()):
            archive.write(picture, f"images/{picture.name}")
        archive.write(folder / "metadata.jsonl", "metadata.jsonl")
    clip = build_tiny_clip(tmp_path / "model", hidden=64, layers=1)
    (tmp_path / "work").mkdir()
    caches = prepare_upload(tmp_path / "work", clip, upload)
    assert caches.pictures is not None
    spec = pair_spec(
        optim={"learning_rate": 2e-3},
        schedule={"epochs": 75.0, "kind": "cosine", "warmup_steps": 10},
        batch={"micro_batch_size": 50, "rows_per_step": 50},
        checkpoints={"every_steps": None},
    )
    train_here(pair_run(clip, caches, spec), tmp_path / "run")

    facts = {"name": "clip", "weights": "0" * 64}
    result = tmp_path / "run" / "adapter"
    model = load_base(result, quantization="none", precision="fp32", device=CPU, task="contrastive", **facts).model
    rows = PairRows(TokenCache.open(caches.folder), PictureCache.open(caches.pictures))
    pairs = [rows.pair(number) for number in range(len(rows))]
    assert len(pairs) == 400
    found = features(model, pairs, PairChunks(100), CPU, normalisation=Normalisation.of_model(clip), compute=nullcontext)
    recall = recall_of(found)
    assert recall["image_to_text_recall_at_1"] >= 0.9, recall
    assert recall["text_to_image_recall_at_1"] >= 0.9, recall

"""Small sets of pictures and captions, through the preparer's own code, and runs over them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.prepare import prepare_pictures, prepare_rows, prepare_tokens
from core.run import (
    PICTURES_FOLDER,
    ROWS_FILE,
    TOKENS_FOLDER,
    PicturesInput,
    RunInput,
    TokenCacheRef,
    TokenizeInput,
    ValidateInput,
)
from core.spec import JobSpec
from tests.core.data.pictures.draw import noise, saved, write_zip

DATASET = "ds_00000000"
_WORDS = ("fox", "dog", "sea", "wind", "poem", "sum", "capital", "France", "tips", "health", "lazy", "quick", "brown", "short")


def random_pairs(count: int, captions: int = 1) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """(pictures by name, rows): noise, each with captions of its own."""
    pictures = {f"{number}.png": saved(noise(number, 40, 36)) for number in range(count)}
    size = len(_WORDS)
    rows = [
        {
            "image": f"{n}.png",
            "captions": [f"{_WORDS[n % size]} {_WORDS[(n // size + c) % size]} number {n} way {c}" for c in range(captions)],
        }
        for n in range(count)
    ]
    return pictures, rows


def prepared(work: Path, model: Path, pictures: Mapping[str, bytes], rows: Sequence[Mapping[str, Any]]) -> TokenCacheRef:
    """Both caches of an upload, as the preparer makes them."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    work.mkdir(parents=True)
    return prepare_upload(work, model, write_zip(work / "pairs.zip", {**pictures, "metadata.jsonl": lines}))


def prepare_upload(work: Path, model: Path, upload: Path) -> TokenCacheRef:
    prepare_rows(ValidateInput(upload=upload, filename=upload.name), work)
    tokens = TokenizeInput(
        dataset_id=DATASET,
        rows=work / ROWS_FILE,
        model_folder=model,
        template="model",
        max_length=512,
        data_kind="picture_pair",
        train_on="everything",
    )
    prepare_tokens(tokens, work)
    prepare_pictures(PicturesInput(dataset_id=DATASET, upload=upload, rows=work / ROWS_FILE, model_folder=model), work)
    return TokenCacheRef(dataset_id=DATASET, folder=work / TOKENS_FOLDER, pictures=work / PICTURES_FOLDER, weight=1.0)


def pair_spec(**changes: Any) -> JobSpec:
    """A short job over pairs in fp32, everything trained; `changes` replace top-level fields."""
    fields: dict[str, Any] = {
        "task": "contrastive",
        "base_model": "test/clip",
        "data": {"datasets": [{"dataset_id": DATASET}]},
        "tuning": {"kind": "full"},
        "optim": {"learning_rate": 1e-3},
        "schedule": {"epochs": 3.0, "kind": "constant"},
        "batch": {"micro_batch_size": 4, "rows_per_step": 8},
        "memory": {"precision": "fp32"},
        "seed": 7,
    }
    return JobSpec.model_validate(fields | changes)


def pair_run(model: Path, caches: TokenCacheRef, spec: JobSpec, resume_from: Path | None = None) -> RunInput:
    return RunInput(
        job_id="job_test",
        attempt=1 if resume_from is None else 2,
        spec=spec,
        model_folder=model,
        model_weights="0" * 64,
        token_caches=[caches],
        resume_from=resume_from,
        device="cpu",
    )

"""Pictures and captions over real HTTP: an archive goes up, CLIP is trained on it, and what comes down is read by plain peft."""

import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from standalone.stack import Stack
from tests.conftest import ROOT
from tests.e2e.service import Service
from tests.tiny import build_tiny_clip

FRESH_PROCESS = """
# Only transformers, peft and what was downloaded: how far the captions' features are from the base's.
import sys
import torch
from peft import PeftModel
from transformers import AutoTokenizer, CLIPModel

result, base = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(result)
ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("a dog", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
with torch.no_grad():
    bare = CLIPModel.from_pretrained(base).eval().get_text_features(ids).pooler_output
    tuned = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), result).eval().get_base_model()
    print(float((tuned.get_text_features(ids).pooler_output - bare).abs().max()))
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def pairs_zip(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    folder = shared_data / "vision" / "pairs"
    path = tmp_path_factory.mktemp("pairs") / "pairs.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for picture in sorted((folder / "images").iterdir()):
            archive.write(picture, f"images/{picture.name}")
        archive.write(folder / "metadata.jsonl", "metadata.jsonl")
    return path


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("pictures")
    (home / "models").mkdir()
    for name in ("clip", "clip-vit-base-patch32"):
        (home / "models" / name).symlink_to(clip)
    with Stack(home, services=("api", "preparer", "worker"), settings={"OMP_NUM_THREADS": "1"}) as stack:
        yield stack


@pytest.fixture(scope="module")
def service(stack: Stack) -> Iterator[Service]:
    service = Service(stack.api_url, "http://127.0.0.1:9", stack.api_key)
    yield service
    service.close()


def pair_job(dataset_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "task": "contrastive",
        "base_model": "clip",
        "data": {"datasets": [{"dataset_id": dataset_id}], "eval_rows": 8},
        "tuning": {"kind": "lora", "rank": 4, "alpha": 8},
        "optim": {"learning_rate": 0.005},
        "schedule": {"epochs": 3},
        "batch": {"micro_batch_size": 4, "rows_per_step": 8},
        "memory": {"precision": "fp32"},
    } | fields


def test_an_archive_of_pictures_becomes_an_adapter(service: Service, pairs_zip: Path, clip: Path, tmp_path: Path) -> None:
    dataset_id = service.ready_dataset(pairs_zip)
    report = service.dataset(dataset_id)["report"]
    assert (report["kind"], report["usable_rows"], report["pictures"]) == ("picture_pair", 39, 39)

    planned = service.api.post("/jobs/plan", json=pair_job(dataset_id)).json()
    assert (planned["memory"], planned["fits"]) == (None, None)
    assert planned["warnings"][0].startswith("there is no estimate of memory and time for task contrastive yet")

    job = service.ended_job(service.submit(pair_job(dataset_id))["id"])
    assert job["status"] == "succeeded", job
    points = service.metrics(job["id"])
    steps = [point for point in points if "loss" in point]
    assert len(steps) == 12
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {"temperature", "alignment", "uniformity"} <= steps[0].keys()
    judged = [point for point in points if "eval_image_to_text_recall_at_1" in point]
    assert [point["step"] for point in judged] == [0, 12]
    assert judged[0]["eval_kept_direction"] == pytest.approx(1) != judged[1]["eval_kept_direction"]

    with tarfile.open(fileobj=io.BytesIO(service.download(job["adapter_id"]))) as archive:
        archive.extractall(tmp_path, filter="data")
    (config,) = tmp_path.rglob("adapter_config.json")
    assert (config.parent / "preprocessor_config.json").read_bytes() == (clip / "preprocessor_config.json").read_bytes()
    command = [sys.executable, "-c", FRESH_PROCESS, str(config.parent), str(clip)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 1e-4

    refused = service.api.post(f"/adapters/{job['adapter_id']}/deploy", json={})
    assert (refused.status_code, "endpoints do not serve yet" in refused.text) == (409, True)

    planned = service.api.post("/jobs/plan", json=pair_job(dataset_id)).json()
    assert (planned["ready"], planned["steps"], planned["train_rows"]) == (True, 12, 31)
    again = service.submit(pair_job(dataset_id, tuning={"kind": "projection"}))
    assert again["status"] == "queued", "tokens and pictures stand already"
    assert service.ended_job(again["id"])["status"] == "succeeded"


def test_what_does_not_go_together_is_refused_with_its_reasons(service: Service, tmp_path: Path) -> None:
    text = tmp_path / "rows.jsonl"
    text.write_text('{"instruction": "a", "output": "b"}\n' * 3)
    dataset_id = service.ready_dataset(text)
    answer = service.api.post("/jobs", json=pair_job(dataset_id))
    assert answer.status_code == 422
    assert "objective info_nce trains on picture_pair rows" in answer.text
    answer = service.api.post("/jobs", json={"base_model": "clip", "data": {"datasets": [{"dataset_id": dataset_id}]}})
    assert answer.status_code == 422
    assert "clip is a CLIPModel, a model for task contrastive, not causal_lm" in answer.text


def test_the_example_of_the_page_does_what_it_says(stack: Stack, shared_data: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "vision.md").read_text(), re.S)
    for written, real in {"http://127.0.0.1:8000": stack.api_url, ".strop/api_key": str(stack.api_key_file)}.items():
        assert written in example
        example = example.replace(written, real)
    folder = shared_data / "vision" / "pairs"
    shutil.copytree(folder / "images", tmp_path / "pictures" / "images")
    shutil.copy(folder / "metadata.jsonl", tmp_path / "pictures")
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^succeeded .*\nloss [\d.]+ -> [\d.]+ at temperature 0\.0[67]\d+$", done.stdout, re.M), done.stdout
    assert len(re.findall(r"^\d+ \{.*'eval_text_to_image_recall_at_10': ", done.stdout, re.M)) == 2
    with tarfile.open(tmp_path / "result.tar.gz") as archive:
        assert any(name.endswith("model.safetensors") for name in archive.getnames())

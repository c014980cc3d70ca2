"""benchmarks.service: a whole service, then the child alone on the same rows; or no number."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import children, service
from benchmarks.train import CASES
from core.data.tokenizer import Tokenizer
from core.data.tokens import TokenCache


def test_rows_are_as_long_as_the_documents_they_stand_for(tiny: Path, tmp_path: Path) -> None:
    service.write_rows(tmp_path / "rows.jsonl", 300)
    tokenizer = Tokenizer.from_folder(tiny)
    lengths = []
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        lengths.append(len(tokenizer.encode(row["instruction"] + row["output"], parse_special=False)[0]))
    assert np.mean(lengths) + service._TEMPLATE_TOKENS == pytest.approx(130, rel=0.1)


def test_a_job_and_the_child_alone_train_on_the_same_rows(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[Path] = []
    given = children.train

    def train(model: Path, cache: Path, *rest: object) -> object:
        alone.append(cache)
        assert len(TokenCache.open(cache)) == CASES["tiny/lora/all/short"].rows * 5
        return given(model, cache, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(service, "train", train)
    monkeypatch.setattr(service, "CHECKPOINT_EVERY", 2)
    asked = ["--shape", "tiny", "--steps", "5", "--models", str(tiny.parent), "--out", str(tmp_path), "--commit", "none"]
    monkeypatch.setattr(sys, "argv", ["service", *asked])
    service.main()
    (file,) = tmp_path.glob("service-*.json")
    found = {(row["case"], row["metric"]): row for row in json.loads(file.read_text())["rows"]}
    share = found["service/tiny/lora/all/short", "share_of_bare"]
    speeds = [found[share["case"], f"{which}tokens_per_second"]["value"] for which in ("", "bare_")]
    assert share["value"] == pytest.approx(speeds[0] / speeds[1])
    assert (share["must"], share["n"]) == (None, 4), "the target is one GPU's"
    assert found["ready/tiny", "claimed_to_first_step_seconds"]["value"] > 0
    assert len(alone) == 1

"""benchmarks.train: the work it says, on the tier it says, or no number."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import train
from benchmarks.train import CASES, TIERS, documents, main, spec_of


@pytest.mark.parametrize(("length", "mean", "longest"), [("short", 130, 512), ("long", 2048, 4096)])
def test_documents_are_as_described(length: str, mean: int, longest: int) -> None:
    rows = documents(2000, length)
    sizes = np.array([len(ids) for ids, _ in rows])
    assert sizes.mean() == pytest.approx(mean, rel=0.05)
    assert sizes.max() <= longest
    trained = [sum(mask) / len(mask) for _, mask in rows]
    assert np.mean(trained) == pytest.approx(0.5, abs=0.02)
    assert min(trained) >= 0.25, "0.3, cut to whole tokens of a row of 16"
    assert rows == documents(2000, length)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_job_of_its_rows(name: str, tier: train.Tier) -> None:
    spec = spec_of(name, tier, 40)
    assert spec.batch.step_rows == CASES[name].rows
    assert spec.memory.fused_layers == (tier == "fused")
    assert (spec.quantization.kind == "nf4") == ("qlora" in name)
    assert spec.memory.checkpointing == name.endswith("ckpt")


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> list[dict[str, object]]:
    monkeypatch.setattr(sys, "argv", ["train", "--cases", "tiny/lora/all/short", "--out", str(out), *arguments])
    monkeypatch.setattr(train, "TIMED", 4)
    monkeypatch.setattr(train, "REPEATED", 6)
    main()
    (file,) = out.glob("train-*.json")
    rows: list[dict[str, object]] = json.loads(file.read_text())["rows"]
    return rows


def test_a_tier_is_measured_in_a_child_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path, "--tiers", "fused")
    found = {row["metric"]: row["value"] for row in rows if row["case"] == "tiny/lora/all/short/fused"}
    assert set(found) == {"tokens_per_second", "tokens_per_step", "loss_fall_on_repeated_documents"}
    assert found["tokens_per_step"] == pytest.approx(18 * 130, rel=0.2)


def test_a_run_on_another_tier_gives_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = train.spec_of
    monkeypatch.setattr(train, "spec_of", lambda name, _, steps: given(name, "plain", steps))
    with pytest.raises(SystemExit, match=r"on fused: plain: batch\.packing is off"):
        run(monkeypatch, tmp_path, "--tiers", "fused")
    assert list(tmp_path.glob("*.json")) == []

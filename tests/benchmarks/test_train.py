"""benchmarks.train: the work it says, on the tier it says, or no number."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import train
from benchmarks.children import in_training_order
from benchmarks.profile import Span, busy_microseconds, memory_report, report
from benchmarks.results import ROOT
from benchmarks.train import CASES, TIERS, documents, main, spec_of
from core.data.tokens import TokenCache
from core.train.batches import TrainingRows, WeightedRows
from tests.core.train.runs import write_cache


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
    kinds = {"lora": "none", "full": "none", "qlora": "nf4", "fp8lora": "fp8"}
    assert spec.quantization.kind == kinds[name.split("/")[1]]
    assert spec.memory.checkpointing == name.endswith("ckpt")


NAME = "tiny/lora/all/short"


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> list[dict[str, object]]:
    monkeypatch.setattr(sys, "argv", ["train", "--cases", NAME, "--out", str(out), *arguments])
    monkeypatch.setattr(train, "WARM_UP", 5)
    monkeypatch.setattr(train, "TIMED", 4)
    monkeypatch.setattr(train, "REPEATED", 6)
    main()
    (file,) = out.glob("train-*.json")
    rows: list[dict[str, object]] = json.loads(file.read_text())["rows"]
    return rows


def test_a_tier_is_measured_in_a_child_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path, "--tiers", "fused")
    found = {row["metric"]: row for row in rows if row["case"] == f"{NAME}/fused"}
    assert set(found) == {"tokens_per_second", "tokens_per_step", "loss_fall_on_repeated_documents"}
    timed = documents(18 * (5 + 4 + 1), "short")[-18 * 4 :]
    assert found["tokens_per_step"]["value"] == pytest.approx(sum(len(ids) for ids, _ in timed) / 4)
    assert (found["tokens_per_second"]["n"], found["loss_fall_on_repeated_documents"]["n"]) == (4, 6)


def test_documents_are_trained_in_the_order_they_are_given(tmp_path: Path) -> None:
    rows, spec = documents(7 * 18, "short"), spec_of(NAME, "packed", 7)
    cache = TokenCache.open(write_cache(tmp_path / "cache", in_training_order(rows, spec)))
    trained = TrainingRows([WeightedRows(cache, 1.0)], eval_rows=0, batch=spec.batch, seed=spec.seed)
    for step in range(7):
        found = [ids.tolist() for example in trained.step_rows(step + 1) for ids, _ in example.sequences]
        assert found == [ids for ids, _ in rows[18 * step : 18 * (step + 1)]]


def test_a_run_on_another_tier_gives_no_number_and_leaves_the_rows_of_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = train.spec_of
    monkeypatch.setattr(train, "spec_of", lambda name, tier, steps: given(name, "packed" if tier == "packed" else "plain", steps))
    with pytest.raises(SystemExit, match=r"on fused: plain: batch\.packing is off"):
        run(monkeypatch, tmp_path, "--tiers", "fused,packed", "--at-once", "2")
    (file,) = tmp_path.glob("train-*.json")
    assert {row["case"] for row in json.loads(file.read_text())["rows"]} == {f"{NAME}/packed"}


def test_what_is_judged_is_timed_over_thirty_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--cases", NAME, "--tiers", "plain,fused", "--timed", "10"])
    with pytest.raises(SystemExit):
        main()
    assert "--timed 10: what is judged is timed over 30 steps" in capsys.readouterr().err


def test_a_profile_is_left_beside_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train, "measure_alone", lambda runs, **_: iter(()))
    monkeypatch.setattr(sys, "argv", ["train", "--cases", NAME, "--tiers", "packed", "--profile", "--out", str(tmp_path)])
    main()
    (file,) = (tmp_path / "profiles").glob("train-*-tiny-lora-all-short-packed.txt")
    text = file.read_text()
    assert f"command: python -m benchmarks.train --cases {NAME} --tiers packed --profile" in text
    assert re.search(r"^3 steps, [0-9.]+ ms each$", text, re.M)
    assert "aten::mm" in text


def test_a_profile_says_how_busy_the_gpu_was_and_with_what() -> None:
    kernels = [Span("gemm", 0, 4000), Span("norm", 3000, 5000), Span("gemm", 8000, 10_000)]
    assert busy_microseconds(kernels) == 7000
    text = report(kernels, [("aten::mm", 500.0, 4)], launches=3, steps=2, wall_seconds=0.01)
    assert "2 steps, 5.0 ms each, the GPU busy for 70.0% of the time" in text
    assert "2 kernels and copies a step, by 2 launches" in text
    assert re.search(r"3\.000 +60\.0% +1\.0  gemm", text)
    assert text.index("gemm") < text.index("norm") < text.index("aten::mm")


def test_a_profile_says_who_held_memory_at_the_peak() -> None:
    gib = 1 << 30
    inside = [{"filename": f"{ROOT}/core/train/fused/layer.py", "line": 7, "name": "forward"}]
    outside = [{"filename": "/lib/torch/x.py", "line": 1, "name": "mul"}, *inside]

    def entry(action: str, addr: int, size: int, frames: list[dict[str, object]]) -> dict[str, object]:
        return {"action": action, "addr": addr, "size": size * gib, "frames": frames}

    trace = [
        entry("free_completed", 1, 1, []),  # an old gradient
        entry("alloc", 2, 2, inside),
        entry("alloc", 3, 3, outside),
        entry("alloc", 1, 4, []),
        entry("free_requested", 1, 4, []),
        entry("free_completed", 1, 4, []),
        entry("alloc", 4, 1, []),
    ]
    text = memory_report(trace, 10 * gib)
    assert "peak of a step: 18.000 GiB, 9.000 of them from before it" in text
    assert re.search(r"5\.000 +2  core/train/fused/layer\.py:7 forward", text)
    assert re.search(r"4\.000 +1  autograd", text)

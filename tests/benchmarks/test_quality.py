"""The comparison of the engine's settings runs, on the tiny model, and says what it measured."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import quality
from tests.benchmarks.conftest import ROWS


def test_plain_and_packed_leave_rows_curves_and_their_gap(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--model", str(tiny), "--data", str(ROWS), "--steps", "12", "--device", "cpu"]
    for case in ("plain-s3", "packed-s3"):  # two calls: results of slices merge
        monkeypatch.setattr(sys, "argv", ["quality", *asked, "--cases", case, "--out", str(tmp_path), "--commit", "none"])
        quality.main()

    rows = json.loads((tmp_path / "quality-cpu-with-1-threads.json").read_text())["rows"]
    found = {(row["case"], row["metric"]): row for row in rows}
    plain, packed = (
        json.loads((tmp_path / "curves" / f"quality-cpu-with-1-threads-{case}-s3.json").read_text())
        for case in ("plain", "packed")
    )
    assert (plain["started"]["tier"], packed["started"]["tier"]) == ("plain", "packed")
    assert plain["tokens"] == packed["tokens"]  # the same rows in every step
    assert len(plain["loss"]) == 12
    assert packed["loss"] == pytest.approx(plain["loss"], abs=0.02)
    gap = abs(found["plain-s3", "eval_loss"]["value"] - found["packed-s3", "eval_loss"]["value"])
    assert found["plain-packed-s3", "eval_loss_gap"]["value"] == pytest.approx(gap, abs=1e-6)
    assert found["plain-packed-s3", "eval_loss_gap"]["must"] == quality.GAP_AT_MOST
    command = found["packed-s3", "eval_loss"]["command"]
    assert str(tmp_path) not in command
    assert command.endswith("--model tiny --data alpaca_seed_en.jsonl --steps 12 --device cpu --cases packed-s3")


def test_an_unknown_setting_is_refused_before_anything_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", "--model", str(tiny), "--data", str(ROWS), "--cases", "plain-s0,folded-s0"])
    with pytest.raises(SystemExit, match="folded-s0"):
        quality.main()

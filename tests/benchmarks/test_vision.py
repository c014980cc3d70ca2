"""benchmarks.vision: rows for every case, or no number and an exit that says why."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import pictures, vision


def test_the_jpeg_pipeline_measures_ours_and_the_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vision", "--pictures", "4", "--turns", "2", "--out", str(tmp_path), "--commit", "none"])
    vision.main()
    rows = {row["metric"]: row for row in json.loads((tmp_path / "vision-one-cpu-core.json").read_text())["rows"]}
    assert set(rows) == {
        "samples_per_core_second",
        "samples_per_wall_second",
        "plain_samples_per_core_second",
        "cached_samples_per_core_second",
    }
    assert all(row["case"] == "jpeg-pipeline" and row["value"] > 0 and row["n"] == 2 for row in rows.values())
    speed = rows["samples_per_core_second"]
    assert (speed["must"], speed["aim"]) == (300, 500)
    assert "pillow" in speed["versions"]


def test_pictures_have_the_weight_of_photographs_and_differ(tmp_path: Path) -> None:
    sizes = [pictures._shard(tmp_path / f"{seed}.tar", 3, seed).stat().st_size / 3 for seed in range(2)]
    assert all(140_000 < size < 180_000 for size in sizes)
    assert (tmp_path / "0.tar").read_bytes() != (tmp_path / "1.tar").read_bytes()


def test_a_case_that_is_none_ends_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vision", "--cases", "png-pipeline", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="png-pipeline: ValueError: no such case; there are jpeg-pipeline"):
        vision.main()

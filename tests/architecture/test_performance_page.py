"""docs/performance.md is what its command makes of the committed results, and says of each target whether it was met."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import PAGE, PEERS, SERVING_PEERS, page, targets, verdict


def test_the_page_is_what_its_command_makes() -> None:
    assert PAGE.read_text() == page(), "run `python -m benchmarks.page`"


def row(case: str, metric: str, value: float, **fields: Any) -> dict[str, Any]:
    facts = {"command": "python -m benchmarks.x", "commit": "abc", "date": "2026-01-01", "device": "H", "versions": {}}
    rest = {"unit": "u", "better": "higher", "must": None, "aim": None, "n": 1, "spread": None}
    return {"case": case, "metric": metric, "value": value} | rest | facts | fields


def test_no_target_is_missing_and_one_without_a_row_is_not_measured(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert len(targets()) >= 30
    for target in targets():
        assert f"| `{target.case}` |" in text
    assert text.count("| not measured |") == len(targets())
    assert set(PEERS) | set(SERVING_PEERS) <= {target.case for target in targets()}


def test_a_missed_must_is_shown_as_missed(tmp_path: Path) -> None:
    case = "llama2-7b/qlora/all/short/fused"
    rows = [
        row(case, "tokens_per_second", 16_000.0, must=18_200, aim=20_000),
        row(case, "peak_allocated_gib", 30.0, must=31, better="lower"),
    ]
    (tmp_path / "train-h.json").write_text(json.dumps({"benchmark": "train", "rows": rows}))
    text = page(tmp_path)
    (speed,) = [line for line in text.splitlines() if "qlora/all/short` | fused | H | tokens_per_second" in line]
    (memory,) = [line for line in text.splitlines() if "qlora/all/short` | fused | H | peak_allocated_gib" in line]
    assert "| 16,000 | u | 18,200 | 20,000 | **missed** |" in speed
    assert "| 30 | u | 31 |  | met |" in memory
    assert "| 1 | `python -m benchmarks.x` | abc | 2026-01-01 | H |" in text


@pytest.mark.parametrize(
    ("value", "better", "must", "aim", "said"),
    [
        (9.0, "lower", 20, 10, "met, and the aim"),
        (12.0, "lower", 20, 10, "met"),
        (21.0, "lower", 20, 10, "**missed**"),
        (0.98, "higher", 0.97, 0.99, "met"),
        (0.96, "higher", 0.97, None, "**missed**"),
    ],
)
def test_verdicts(value: float, better: str, must: float, aim: float | None, said: str) -> None:
    assert verdict(row("c", "m", value, better=better, must=must, aim=aim)) == said


def test_a_benchmark_that_the_page_does_not_know_has_its_rows_there_too(tmp_path: Path) -> None:
    (tmp_path / "new-h.json").write_text(json.dumps({"benchmark": "new", "rows": [row("a/b", "speed", 12.5)]}))
    assert "| `a/b` | H | 12.50 | 1 |" in page(tmp_path)

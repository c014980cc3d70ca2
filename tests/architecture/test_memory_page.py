"""docs/memory.md holds the numbers of the committed result file, and a refusal that the plan really makes."""

import json
import re
from typing import Any

import pytest

from benchmarks.memory import CASES, spec_of_case
from benchmarks.shapes import SHAPES
from core.plan import plan
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "memory.md").read_text()
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "memory-nvidia-h100-80gb-hbm3.json").read_text())["rows"]
MEASURED = {(row["case"], row["metric"]): row["value"] for row in RESULTS}
ROW = re.compile(r"^\| `([a-z0-9-]+)` \|.*\| ([0-9.]+) \| ([0-9,]+) \|$", re.M)


def rows(heading: str) -> list[tuple[str, float, int]]:
    part = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
    return [(case, float(peak), int(speed.replace(",", ""))) for case, peak, speed in ROW.findall(part)]


@pytest.mark.parametrize(("heading", "shape"), [("One lever", "llama-1.1b"), ("Llama-2-7B", "llama2-7b")])
def test_its_tables_are_what_was_measured(heading: str, shape: str) -> None:
    found = rows(heading)
    measured = {case.removeprefix(f"{shape}/") for case, _ in MEASURED if case.startswith(shape)}
    assert {case for case, _, _ in found} == measured, "every measured case has its row"
    for case, peak, speed in found:
        assert peak == pytest.approx(MEASURED[f"{shape}/{case}", "peak_allocated_gib"], abs=0.006), case
        assert speed == round(MEASURED[f"{shape}/{case}", "tokens_per_second"]), case
    assert measured <= set(CASES)


def test_what_it_calls_unmeasured_is_so() -> None:
    named = set(re.findall(r"`([a-z0-9-]+)`", PAGE.split("Not measured yet:")[1].split("The cases stand")[0]))
    assert named
    assert named <= set(CASES)
    assert not {name for name in named if (f"llama-1.1b/{name}", "peak_allocated_gib") in MEASURED}


def test_a_full_7b_is_refused_by_its_plan() -> None:
    config: dict[str, Any] = {"vocab_size": 32000, "tie_word_embeddings": False, **SHAPES["llama2-7b"]}
    planned = plan(
        spec_of_case("full"),
        architecture="LlamaForCausalLM",
        parameters=6_738_415_616,
        config=config,
        counts=None,
        budget_gib=78.0,
    )
    assert not planned.fits
    said = re.search(r"^\| `full` \|.*\| 66 \| planned ([0-9.]+), refused", PAGE, re.M)
    assert said is not None
    assert float(said[1]) == pytest.approx(planned.memory.total_gib, abs=0.06)

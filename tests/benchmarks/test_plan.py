"""The plan's benchmark runs on the tiny model; fitting finds coefficients again that measurements were made with."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import plan, plan_cases
from core.plan.coefficients import GPUS, STANDING
from core.plan.memory import estimate_memory
from core.plan.time import step_seconds


def test_a_case_leaves_what_was_planned_and_what_it_took(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["plan", "--set", "tiny", "--part", "1/2", "--models", str(tiny.parent), "--out", str(tmp_path), "--commit", "none"]
    monkeypatch.setattr(sys, "argv", asked)
    plan.main()
    (file,) = tmp_path.glob("plan-*.json")
    found = {row["metric"]: row for row in json.loads(file.read_text())["rows"]}
    assert {row["case"] for row in found.values()} == {"tiny/lora16-all-64-4x2"}
    assert found["tier_as_planned"]["value"] == 1
    assert found["step_seconds"]["n"] == 4
    assert found["planned_gib"]["value"] > 0


def test_a_case_that_is_not_in_the_set_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", "--set", "tiny", "--cases", "tiny/none,tiny/lora16-all-64-4x2"])
    with pytest.raises(SystemExit):
        plan.main()
    assert "--cases: tiny/none is not in the set tiny" in capsys.readouterr().err


def test_judged_cases_are_no_fitting_cases_and_some_are_of_another_kind() -> None:
    fitting, judged = ({case.name for case in cases} for cases in (plan_cases.FITTING, plan_cases.JUDGED))
    assert len(fitting) == len(plan_cases.FITTING) >= 16
    assert len(judged) == len(plan_cases.JUDGED) >= 24
    assert not fitting & judged
    known = {field: {getattr(case, field) for case in plan_cases.FITTING} for field in ("shape", "rank", "length")}
    new = [case for case in plan_cases.JUDGED if any(getattr(case, field) not in values for field, values in known.items())]
    assert len(new) >= 6
    assert {case.shape for case in plan_cases.JUDGED} == {"llama-1.1b", "llama2-7b", "qwen3-8b"}
    assert {256, 8192} <= {case.length for case in plan_cases.JUDGED}


def test_fitting_finds_the_coefficients_of_made_up_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = replace(STANDING, fixed_gib=0.4, kept_packed=1.1, kept_plain=0.95, matmul_share=0.5, traffic_packed=12.0)
    rows = []
    for case in plan_cases.FITTING:
        work = plan.work_of_case(case, None)
        values = {
            "peak_allocated_gib": estimate_memory(work, truth).total_gib,
            "step_seconds": step_seconds(work, GPUS["H100"], truth),
            "tier_as_planned": 1.0,
        }
        rows += [{"case": case.name, "metric": name, "value": value, "device": "NVIDIA H100"} for name, value in values.items()]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"rows": rows}))
    measured = plan.measurements(file, plan_cases.FITTING)
    memory = plan.nearest(STANDING, ["fixed_gib", "kept_packed", "kept_plain"], lambda k: plan._errors(measured, k, "memory"))
    assert memory.fixed_gib == pytest.approx(0.4, rel=0.1)
    assert (memory.kept_packed, memory.kept_plain) == pytest.approx((1.1, 0.95), rel=0.02)
    monkeypatch.setattr(sys, "argv", ["plan", "--fit", str(file), "--table", str(file)])
    plan.main()
    said = capsys.readouterr().out
    count = len(plan_cases.FITTING)
    assert f"fitted to {count} of {count} cases" in said
    after = said.split(f"n {count}")
    for what in after[:2]:
        assert float(what.split("p90 of |error| ")[1].split("%")[0]) < 3, said
    assert "| llama2-7b/qlora16-all-1024-8x2-ckpt1 |" in said

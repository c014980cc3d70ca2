"""Measured peaks move the estimated parts of a plan of their kind, within bounds, and nothing else."""

from typing import Any

import pytest

from core.plan import plan
from core.plan.memory import estimate_memory
from core.plan.refine import HIGHEST, LOWEST, RUNS_ASKED, method_of, ratio_of, refined, refinement
from core.records import PlanRecord
from tests.core.plan.jobs import H100, LLAMA_7B, PARAMETERS_7B, equal, spec, work

LORA: dict[str, Any] = {"batch": {"micro_batch_size": 8, "gradient_accumulation_steps": 4}}
COUNTED = ("weights_gib", "gradients_gib", "optimizer_gib")


def planned(measured: dict[str, list[float]], budget_gib: float | None = None, **fields: Any) -> PlanRecord:
    return plan(
        spec(**(LORA | fields)),
        architecture="LlamaForCausalLM",
        parameters=PARAMETERS_7B,
        config=LLAMA_7B,
        counts=[equal(1000, 512)],
        budget_gib=budget_gib,
        gpu=H100,
        measured=measured,
    )


def test_a_ratio_put_into_the_plan_gives_what_was_measured() -> None:
    before = planned({}).memory
    ratio = ratio_of(before, before.total_gib + 3)
    assert ratio is not None
    after = planned({method_of(work(spec(**LORA), equal(1000, 512))): [ratio]})
    assert after.memory.total_gib == pytest.approx(before.total_gib + 3)
    assert [getattr(after.memory, part) for part in COUNTED] == [getattr(before, part) for part in COUNTED]
    parts = [value for name, value in after.memory.model_dump().items() if name != "total_gib"]
    assert after.memory.total_gib == pytest.approx(sum(parts))
    assert after.refinement is not None
    assert (after.refinement.factor, after.refinement.runs) == (pytest.approx(ratio), 1)


def test_runs_of_another_kind_say_nothing() -> None:
    method = method_of(work(spec(**LORA), equal(1000, 512)))
    plain = planned({})
    assert plain.refinement is None
    for fields in ({"quantization": {"kind": "nf4"}}, {"memory": {"checkpointing": True}}, {"tuning": {"kind": "full"}}):
        assert planned({method: [1.3]}, **fields) == planned({}, **fields)
    longer = planned({method: [1.3]}, data={"max_length": 1024})
    assert longer.refinement is not None, "the same kind at another length"


@pytest.mark.parametrize(
    ("ratios", "factor"),
    [
        ([0.9], 1.0),
        ([0.9, 0.85], 1.0),
        ([0.9, 0.85, 0.88], 0.9),
        ([1.2], 1.2),
        ([0.5, 0.5, 0.5], LOWEST),
        ([0.9, 9.0], HIGHEST),
        ([1.0] * RUNS_ASKED + [1.4], 1.0),
    ],
)
def test_one_run_may_raise_a_plan_and_three_may_lower_it(ratios: list[float], factor: float) -> None:
    found = refinement(ratios)
    assert found is not None
    assert found.factor == pytest.approx(factor)
    assert found.runs == min(len(ratios), RUNS_ASKED)


def test_a_plan_that_is_all_weights_has_nothing_to_measure() -> None:
    small = estimate_memory(work(spec(batch={"micro_batch_size": 1}, data={"max_length": 8}), equal(10, 8)))
    assert ratio_of(small, small.total_gib + 1) is None
    assert refined(small, None) == small


def test_a_refined_plan_decides_what_fits_and_which_change_helps() -> None:
    method = method_of(work(spec(**LORA), equal(1000, 512)))
    before = planned({})
    budget = before.memory.total_gib + 0.5
    assert planned({}, budget_gib=budget).fits
    after = planned({method: [1.4]}, budget_gib=budget)
    assert after.fits is False
    smaller = next(knob for knob in after.knobs if knob.changes.get("/batch/micro_batch_size") == 4 and len(knob.changes) == 2)
    assert smaller.total_gib > planned({}, batch={"micro_batch_size": 4, "gradient_accumulation_steps": 8}).memory.total_gib

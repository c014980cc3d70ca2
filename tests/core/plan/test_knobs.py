"""Knobs really make a job fit: each is a plan of the changed job."""

from typing import Any

import pytest

from core.plan import does_not_fit
from core.plan.knobs import changed_spec
from core.records import PlanRecord
from core.spec import JobSpec
from tests.core.plan.jobs import H100, equal, planned, spec

ROWS = equal(1000, 512)


def too_large(job: JobSpec, budget_gib: float) -> PlanRecord:
    found = planned(job, ROWS, budget_gib=budget_gib, gpu=H100)
    assert found.fits is False
    return found


@pytest.mark.parametrize(
    ("fields", "budget_gib"),
    [
        ({"batch": {"micro_batch_size": 32}}, 40.0),
        ({"batch": {"micro_batch_size": 32}}, 24.0),
        ({"batch": {"micro_batch_size": 32}}, 8.0),
        ({"tuning": {"kind": "full"}}, 80.0),
        ({"batch": {"micro_batch_size": 16, "packing": "off"}, "memory": {"checkpointing": True}}, 15.0),
    ],
)
def test_each_is_what_the_changed_job_takes(fields: dict[str, Any], budget_gib: float) -> None:
    job = spec(**fields)
    record = too_large(job, budget_gib)
    assert record.knobs
    assert record.knobs[0].fits
    assert record.step_seconds is not None
    for knob in record.knobs:
        changed = changed_spec(job, knob.changes)
        assert changed is not None
        again = planned(changed, ROWS, budget_gib=budget_gib, gpu=H100)
        assert (again.memory.total_gib, again.fits) == (knob.total_gib, knob.fits)
        assert knob.total_gib < record.memory.total_gib
        if knob.changes.keys() != {"/data/max_length"}:
            assert again.step_seconds == pytest.approx(knob.step_time * record.step_seconds)
            assert (again.steps, again.total_tokens) == (record.steps, record.total_tokens), "a step's rows stay what they are"


def test_the_best_comes_first() -> None:
    knobs = too_large(spec(batch={"micro_batch_size": 32}), 40.0).knobs
    order = [(not knob.fits, not knob.same_training, knob.step_time) for knob in knobs]
    assert order == sorted(order)
    first = knobs[0]
    assert first.same_training
    assert set(first.changes) <= {
        "/batch/micro_batch_size",
        "/batch/gradient_accumulation_steps",
        "/memory/checkpointing",
        "/memory/checkpointing_offload",
    }
    keys = [tuple(sorted(knob.changes)) for knob in knobs]
    assert ("/batch/gradient_accumulation_steps", "/batch/micro_batch_size") in keys
    assert ("/memory/checkpointing",) in keys


def test_what_is_no_job_is_not_proposed() -> None:
    """Quantised full tuning, new tokens over quantised weights: the spec refuses them."""
    full = too_large(spec(tuning={"kind": "full"}), 60.0).knobs
    assert not any("/quantization" in knob.changes and "/tuning" not in knob.changes for knob in full)
    named = too_large(spec(data={"new_tokens": ["<a>"]}, batch={"micro_batch_size": 32}), 20.0).knobs
    assert not any("/quantization" in knob.changes for knob in named)
    assert changed_spec(spec(tuning={"kind": "full"}), {"/quantization": {"kind": "nf4"}}) is None


def test_a_job_that_fits_has_none_and_a_hopeless_one_says_so() -> None:
    assert planned(spec(), ROWS, budget_gib=80.0).knobs == []
    record = too_large(spec(), 1.0)
    assert not any(knob.fits for knob in record.knobs)
    assert "none of the known changes is enough" in does_not_fit(record.memory, 1.0, record.knobs)


def test_a_refusal_holds_the_numbers_and_the_way_out() -> None:
    record = too_large(spec(batch={"micro_batch_size": 32}), 40.0)
    said = does_not_fit(record.memory, 40.0, record.knobs)
    assert said == record.warnings[-1]
    assert f"about {record.memory.total_gib:.1f} GiB are needed (weights {record.memory.weights_gib:.1f}, " in said
    assert "plans with 40.0: " in said
    assert "times as long a step)" in said


AUTO: dict[str, Any] = {"micro_batch_size": "auto", "rows_per_step": 64}


def test_auto_is_the_most_rows_that_leave_a_tenth_of_the_budget() -> None:
    large, small = (planned(spec(batch=AUTO), ROWS, budget_gib=budget) for budget in (78.0, 30.0))
    assert large.rows_at_once > small.rows_at_once > 1
    for record, budget in ((large, 78.0), (small, 30.0)):
        assert record.memory.total_gib <= 0.9 * budget
        said = {"micro_batch_size": record.rows_at_once, "rows_per_step": 64}
        assert planned(spec(batch=said), ROWS).memory == record.memory
        more = {"micro_batch_size": 2 * record.rows_at_once, "rows_per_step": 64}
        assert planned(spec(batch=more), ROWS).memory.total_gib > 0.9 * budget
        assert (record.steps, record.fits, record.knobs) == (16, True, [])


def test_auto_goes_down_to_one_row_and_no_further() -> None:
    record = planned(spec(batch=AUTO), ROWS, budget_gib=14.0)
    assert (record.rows_at_once, record.fits) == (1, False)
    assert record.knobs[0].fits
    assert planned(spec(batch=AUTO), ROWS).rows_at_once == 4, "nobody has said how much room there is"

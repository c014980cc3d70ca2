"""The plan counts as the engine counts, names what can't be, and its memory follows the shapes."""

from typing import Any

import pytest

from core.plan import count_steps
from core.spec import ScheduleSpec
from tests.core.plan.jobs import counted, planned, spec


@pytest.mark.parametrize(
    ("rows", "per_step", "schedule", "steps"),
    [
        (100, 10, {}, 10),
        (101, 10, {}, 11),
        (3, 10, {}, 1),
        (101, 10, {"epochs": 3.0}, 33),
        (101, 10, {"epochs": 0.1}, 2),
        (30, 1, {"epochs": 0.1}, 3),
        (100, 10, {"epochs": 3.0, "max_steps": 7}, 7),
        (100, 10, {"max_steps": 700}, 10),
        (100, 10, {"epochs": 0.001}, 1),
    ],
)
def test_steps_are_whole_and_an_epoch_ends_with_what_is_left(
    rows: int, per_step: int, schedule: dict[str, Any], steps: int
) -> None:
    assert count_steps(rows, per_step, ScheduleSpec(**schedule)) == steps


def test_rows_without_a_target_and_held_out_rows_are_not_trained() -> None:
    job = spec(data={"eval_rows": 8}, batch={"micro_batch_size": 4, "gradient_accumulation_steps": 2})
    record = planned(job, counted(100, rows_without_target=4))
    assert (record.train_rows, record.eval_rows, record.steps) == (88, 8, 11)


def test_the_weight_of_a_dataset_is_its_passes_per_epoch() -> None:
    datasets = [{"dataset_id": "ds_aaaaaaaaaa", "weight": 2.0}, {"dataset_id": "ds_bbbbbbbbbb", "weight": 0.5}]
    job = spec(data={"datasets": datasets}, batch={"micro_batch_size": 1})
    record = planned(job, counted(10), counted(20, dataset="ds_bbbbbbbbbb"))
    assert (record.train_rows, record.steps) == (30, 2 * 10 + 10)


def test_steps_are_counted_by_examples_of_which_a_text_makes_several() -> None:
    job = spec(objective={"kind": "plain_text"}, data={"eval_rows": 10}, batch={"micro_batch_size": 5})
    record = planned(job, counted(3, examples=110, rows_without_target=1))
    assert (record.train_rows, record.eval_rows, record.steps) == (100, 10, 20)


def test_without_counts_the_plan_is_not_ready_and_knows_no_steps() -> None:
    record = planned(spec())
    assert (record.ready, record.steps, record.train_rows, record.fits) == (False, None, None, None)
    assert record.memory.total_gib > 0


def test_a_sound_job_is_not_warned_about() -> None:
    job = spec(batch={"micro_batch_size": 4, "gradient_accumulation_steps": 4})
    assert planned(job, counted(1000), budget_gib=80).warnings == []


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"optim": {"learning_rate": 0.1}}, "optim.learning_rate 0.1 is outside 5e-05 to 0.0005, the usual range of LoRA"),
        ({"quantization": {"kind": "nf4"}, "optim": {"learning_rate": 1e-5}}, "QLoRA"),
        ({"quantization": {"kind": "fp4"}, "optim": {"learning_rate": 1e-5}}, "QLoRA"),
        ({"tuning": {"kind": "full"}}, "full tuning"),
        ({"tuning": {"kind": "lora", "rank": 256}}, "tuning.rank 256"),
        ({"tuning": {"kind": "lora", "alpha": 1.0}}, "tuning.alpha 1"),
        ({"batch": {"micro_batch_size": 1}}, "1 rows per step"),
        ({"schedule": {"warmup_steps": 1000}}, "warmup_steps 1000 covers all"),
        ({"data": {"eval_rows": 1000}}, "leaves no row"),
        ({"batch": {"micro_batch_size": 64}, "data": {"max_length": 4096}}, "GiB are needed"),
    ],
)
def test_what_looks_unwise_is_said(fields: dict[str, Any], part: str) -> None:
    record = planned(spec(**fields), counted(1000, longest=9999), budget_gib=24.0)
    assert any(part in warning for warning in record.warnings), record.warnings


def test_rows_that_lose_their_end_or_are_dropped_are_said() -> None:
    record = planned(spec(), counted(50, truncated_rows=7, rows_without_target=2, longest=900))
    assert any("7 of 50 rows are longer than data.max_length 512" in w and "900" in w for w in record.warnings)
    assert any("2 rows keep no token" in warning for warning in record.warnings)


def test_a_job_fits_when_its_total_is_within_the_budget() -> None:
    total = planned(spec(), counted(10)).memory.total_gib
    assert planned(spec(), counted(10), budget_gib=total + 0.1).fits is True
    assert planned(spec(), counted(10), budget_gib=total - 0.1).fits is False

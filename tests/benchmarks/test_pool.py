"""benchmarks.pool: set up side by side, trained one by one; a child's trouble is its own, and none is left running."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks import plan, plan_cases, pool
from benchmarks.pool import Outcome, Run, in_turn, measure_alone, needed_gib, next_batch, run_of_work
from core.events import Ended
from core.plan.memory import estimate_memory
from core.states import Reason
from tests.core.train.runs import random_rows, spec_of, write_cache

STEPS, WARM_UP = 44, 40
"""So many before the timed ones that a parent which is slow to stop a child of tiny steps is not too late."""


def run_of(name: str, model: Path, folder: Path, *, peak: float = 1.0, standing: float = 0.5) -> Run:
    spec = spec_of(data={"datasets": [{"dataset_id": "ds_00000000"}]}, schedule={"epochs": 100.0, "max_steps": STEPS})
    return Run(name, model, folder / "cache", spec, folder / name, WARM_UP, peak, standing)


def left_running() -> list[str]:
    found = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    return [command for command in found if "core.train" in command]


def test_children_start_together_and_train_one_by_one_and_one_that_fails_takes_nothing_with_it(
    tiny: Path, tmp_path: Path
) -> None:
    write_cache(tmp_path / "cache", random_rows(40))
    runs = [run_of(name, tiny, tmp_path) for name in ("first", "failing", "last")]
    (tmp_path / "empty").mkdir()
    runs[1] = replace(runs[1], model=tmp_path / "empty")
    outcomes = {outcome.run.name: outcome for outcome in measure_alone(runs, at_once=3)}
    assert list(outcomes) == ["first", "failing", "last"]
    assert left_running() == []
    failed = outcomes["failing"]
    assert failed.timed == []
    assert "0 of 44 steps were trained" in failed.trouble
    assert "Traceback" in failed.trouble, "the end of its log"
    first, last = outcomes["first"], outcomes["last"]
    assert (first.trouble, last.trouble) == ("", "")
    for outcome in (first, last):
        assert [step.step for step in outcome.timed] == [41, 42, 43, 44]
    began = [next(event.at for event in outcome.events if event.kind == "started") for outcome in (first, last)]
    assert max(began) < min(step.at for outcome in (first, last) for step in outcome.timed), "set up before any of them is timed"
    assert first.steps[-1].at <= min(step.at - step.step_seconds for step in last.timed), "alone while it is timed"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"silent_seconds": 0.01}, "no word for 0 s; 0 of 44 steps"),
        ({"end_at": 0.3}, "the time was up; 0 of 44 steps"),
        ({"begin_until": 0.0}, "not begun, the time is up"),
    ],
)
def test_what_hangs_or_is_late_is_ended_and_named(tiny: Path, tmp_path: Path, limits: dict[str, float], said: str) -> None:
    write_cache(tmp_path / "cache", random_rows(40))
    runs = [run_of(name, tiny, tmp_path) for name in ("one", "two")]
    now = time.monotonic()
    limits = {name: value if name == "silent_seconds" else now + value for name, value in limits.items()}
    found = list(measure_alone(runs, at_once=2, **limits))
    assert [outcome.run.name for outcome in found] == ["one", "two"]
    assert all(outcome.trouble.startswith(said) and not outcome.steps for outcome in found), found
    assert left_running() == []


def test_a_child_that_does_not_stop_is_ended_before_it_disturbs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path / "cache", random_rows(40))
    monkeypatch.setattr("os.waitid", lambda *_: None)
    monkeypatch.setattr(pool, "_STOP_SECONDS", 0.0)
    outcomes = list(measure_alone([run_of(name, tiny, tmp_path) for name in ("one", "two")], at_once=2))
    assert [outcome.run.name for outcome in outcomes] == ["one", "two"]
    assert all(outcome.trouble.startswith("was told to stop, and did not in 0 s; 0 of 44 steps") for outcome in outcomes)
    assert left_running() == []


def test_none_is_left_where_the_reader_gives_up(tiny: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", random_rows(40))
    outcomes = measure_alone([run_of(name, tiny, tmp_path) for name in ("one", "two")], at_once=2)
    next(outcomes)
    assert len(left_running()) == 1, "the other stands stopped"
    outcomes.close()  # type: ignore[attr-defined]
    assert left_running() == []


def test_a_batch_has_room_for_those_that_stand_beside_the_one_that_trains() -> None:
    large, small, other, third = (
        run_of(name, Path(), Path(), peak=peak, standing=standing)
        for name, peak, standing in [("large", 50, 15), ("small", 10, 4), ("other", 20, 5), ("third", 20, 5)]
    )
    assert [run.name for run in in_turn([large, small, other])] == ["small", "other", "large"]
    assert needed_gib([large, other]) == pytest.approx(50 * 1.1 + 1), "the other is gone when the large one trains"
    assert needed_gib([small, large]) == pytest.approx(50 * 1.1 + 1)
    assert needed_gib([other, third]) == pytest.approx(20 * 1.1 + 5 + 2)
    assert next_batch([large, small, other, third], 56, 4) == [large, small, other, third]
    assert next_batch([large, small, other, third], 56, 2) == [large, small]
    assert next_batch([other, large, third], 40, 4) == [other, third]
    assert next_batch([large, small], 40, 4) == [large], "what fits nowhere is tried alone"


@pytest.mark.parametrize("case", [*plan_cases.FITTING, *plan_cases.JUDGED], ids=lambda case: case.name)
def test_a_planned_child_stands_with_its_weights_and_less_than_its_peak(case: plan_cases.Case) -> None:
    work = plan.work_of_case(case, None)
    run = run_of_work(work, name="", model=Path(), cache=Path(), folder=Path(), warm_up=1)
    planned = estimate_memory(work)
    assert planned.weights_gib < run.standing_gib <= run.peak_gib == planned.total_gib


def test_a_run_short_of_memory_beside_others_is_done_again_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def measured(batch: Sequence[Run], silent_seconds: float, end_at: float) -> Iterator[Outcome]:
        batches.append([run.name for run in batch])
        for run in batch:
            events = [Ended(reason=Reason.CUDA_OOM, message="", step=0)] if run.name == "two" else []
            yield Outcome(run, events, [], "short of memory" if events else "")  # type: ignore[arg-type]

    monkeypatch.setattr(pool, "_measure", measured)
    runs = [run_of(name, Path(), Path()) for name in ("one", "two", "three")]
    found = [(outcome.run.name, outcome.trouble) for outcome in measure_alone(runs, at_once=2)]
    assert batches == [["one", "two"], ["three"], ["two"]]
    assert found == [("one", ""), ("three", ""), ("two", "short of memory")]

"""The demo's verdict against numbers worked out by hand."""

import math
from typing import Any

import pytest

from standalone.verdict import Check, answers_check, paired_drop, training_checks


def test_the_drop_is_a_ratio_of_sums_not_a_mean_of_row_means() -> None:
    # 10 nats over 1 token and 10 over 9: 20/10 before; each row loses 1 nat: 18/10 after.
    drop = paired_drop([(10.0, 1), (10.0, 9)], [(9.0, 1), (9.0, 9)])
    assert (drop.before, drop.after) == (2.0, 1.8)
    assert drop.drop == pytest.approx(0.2)
    # Residuals d - R·t: 1 - 0.2 = 0.8 and 1 - 1.8 = -0.8; squares 1.28; n/(n-1) = 2; sqrt(2.56)/10 = 0.16.
    assert drop.standard_error == pytest.approx(0.16)


def test_the_standard_error_of_four_rows_is_the_hand_computed_one() -> None:
    before = [(4.0, 2), (6.0, 3), (10.0, 5), (20.0, 10)]
    after = [(3.0, 2), (5.5, 3), (7.0, 5), (18.0, 10)]
    drop = paired_drop(before, after)
    # d = 1, 0.5, 3, 2; R = 6.5 / 20 = 0.325; residuals 0.35, -0.475, 1.375, -1.25; squares sum to 3.80125.
    assert drop.drop == pytest.approx(0.325)
    assert drop.standard_error == pytest.approx(math.sqrt(4 / 3 * 3.80125) / 20)


def test_rows_that_fall_in_step_leave_no_error_however_unlike_they_are() -> None:
    drop = paired_drop([(1.0, 2), (50.0, 4)], [(0.8, 2), (49.6, 4)])
    assert drop.drop == pytest.approx(0.1)
    assert drop.standard_error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([(1.0, 2), (1.0, 2)], [(1.0, 2), (1.0, 3)], "not over the same rows"),
        ([(1.0, 2), (1.0, 2)], [(1.0, 2)], "not over the same rows"),
        ([(1.0, 2)], [(0.5, 2)], "two held-out rows"),
    ],
)
def test_evaluations_that_cannot_be_compared_are_refused(
    before: list[tuple[float, int]], after: list[tuple[float, int]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        paired_drop(before, after)


def test_a_good_run_passes_every_check() -> None:
    assert [check for check in training_checks(_events()) if not check.passed] == []


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"steps": 59, "tokens": 500}, ["60 optimizer steps or more"]),
        ({"tokens": 249}, ["15,000 tokens or more"]),
        ({"rows": 31}, ["32 held-out rows or more"]),
        ({"fall": 0.04}, ["held-out loss falls by 0.05 nats per token or more"]),
        ({"wobble": 40.0}, ["by more than 2 paired standard errors"]),
    ],
)
def test_each_shortfall_fails_its_own_check(changes: dict[str, Any], failing: list[str]) -> None:
    assert [check.claim for check in training_checks(_events(**changes)) if not check.passed] == failing


def test_steps_run_again_by_a_second_attempt_count_once() -> None:
    events = _events(steps=40, tokens=1000)
    steps = [event for event in events if event["kind"] == "step"]
    assert training_checks(events + steps)[0] == Check("60 optimizer steps or more", False, "40")


def test_a_run_without_a_second_evaluation_fails() -> None:
    events = [event for event in _events() if event["kind"] != "eval"]
    assert "0 evaluations" in [check.found for check in training_checks(events)]


def test_one_different_answer_is_enough_and_none_is_not() -> None:
    assert answers_check([("q", "same", "same"), ("r", "one", "two")]).passed
    assert not answers_check([("q", "same", "same")]).passed


def _events(steps: int = 60, tokens: int = 250, rows: int = 32, fall: float = 0.2, wobble: float = 0.0) -> list[dict[str, Any]]:
    """Rows of 10 tokens that lose `fall` nats per token; `wobble` is added to one row and taken from the next."""
    before = [[20.0, 10]] * rows
    after = [[20.0 - 10 * fall + wobble * (-1) ** row, 10] for row in range(rows)]
    return [
        {"kind": "eval", "data": {"step": 0, "row_losses": before}},
        *({"kind": "step", "data": {"step": n, "tokens": tokens}} for n in range(1, steps + 1)),
        {"kind": "eval", "data": {"step": steps, "row_losses": after}},
    ]
